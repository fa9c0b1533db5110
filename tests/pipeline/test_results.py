"""Results of several runs, from made-up evaluations: what they say is met, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer.config import DreamerConfig
from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS, score_open_loop
from dreamer.pipeline.results import collect_results
from dreamer.pipeline.results_page import markdown, write_results
from dreamer.pipeline.run import git_revision, write_json
from dreamer.pipeline.targets import are_apart
from dreamer.yaml_config import save_config

GOOD = {"random": 0.0, "scripted": 10.0, "bc": 5.0, "bc_long": 6.0, "agent": 9.0}


def world_model(error: int, other: int) -> dict[str, Any]:
    truth = torch.full((3, 2, 3, 16, 16), 100, dtype=torch.uint8)
    predictions = {TRUE_ACTIONS: truth + error, SHUFFLED_ACTIONS: truth + other, COPY_LAST_FRAME: truth + other, RECONSTRUCTION: truth}
    return score_open_loop(truth, predictions, context=1, fps=8.0).to_json()


def rows(seed: int, means: dict[str, float]) -> list[dict[str, Any]]:
    seeds = tuple(range(100 * seed, 100 * seed + 4))

    def row(role: str, mode: str | None) -> dict[str, Any]:
        returns = tuple(means[role] + offset for offset in (-0.5, 0.5, -0.5, 0.5))
        return {"label": role.upper(), "role": role, "mode": mode, "result": AgentResult(role, returns, (5,) * 4, (), seeds).to_json()}

    return [row(role, mode) for role in means for mode in ((None,) if role in ("random", "scripted") else ("sampled", "argmax"))]


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    def make(
        seed: int, *, error: int = 2, other: int = 8, minutes: float = 10.0, gigabytes: float = 1.0, changes: Any = None, **means: float
    ) -> Path:
        path = tmp_path / f"seed_{seed}"
        save_config(DreamerConfig.model_validate({"seed": seed, "run_dir": path, **(changes or {})}), path / "config.yaml")
        write_json(path / "evaluation" / "world_model.json", {"inputs": {}, "result": world_model(error, other)})
        write_json(path / "evaluation" / "agent.json", {"inputs": {}, "fps": 8.0, "rows": rows(seed, GOOD | means)})
        spent = {"seconds": 30.0 * minutes, "peak_memory_mb": 1000 * gigabytes}
        machine = {"CPU": "2 cores", "threads": "2"}
        run = {"command": f"dreamer demo seed={seed}", "hardware": machine, "stages": {"phase1": spent, "phase2": spent}}
        write_json(path / "evaluation" / "run.json", run | {"versions": {"torch": "2"}, "revisions": ["abc"]})
        (path / "report.html").write_text(f"<p>seed {seed}</p>")
        return path

    return make


def verdicts(paths: list[Path]) -> dict[str, bool]:
    return {check.target: check.is_met for check in collect_results(paths).checks}


def test_three_good_runs_meet_everything(finished: Callable[..., Path], tmp_path: Path) -> None:
    paths = [finished(seed, agent=9.0 - 0.1 * seed) for seed in range(3)]
    results = collect_results(paths, "dreamer demo --seeds 0 1 2")
    assert [check.target for check in results.checks if not check.is_met] == [] and len(results.checks) == 11
    write_results(results, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["figures"]["returns"]["agent sampled"]["min"] == pytest.approx(8.8)
    assert saved["figures"]["way"]["agent argmax"]["pooled"]["value"] == pytest.approx(0.89)
    assert saved["checks"][1]["met"] is True and saved["checks"][1]["runs_that_meet_it_alone"] == 3
    assert saved["runs"][2] == {
        "run_dir": str(paths[2]),
        "seed": 2,
        "seconds": {"phase1": 300.0, "phase2": 300.0},
        "total_seconds": 600.0,
        "peak_memory_mb": 1000.0,
        "command": "dreamer demo seed=2",
        "hardware": {"CPU": "2 cores", "threads": "2"},
        "versions": {"torch": "2"},
        "revisions": ["abc"],
    }
    page = (tmp_path / "out" / "README.md").read_text()
    assert "11 of 11 targets are met" in page and "NOT met" not in page and "| abc |" in page and "10 min 00 s" in page
    assert (tmp_path / "out" / "report.html").read_text() == "<p>seed 0</p>"
    picture = (tmp_path / "out" / "summary.png").read_bytes()
    write_results(results, tmp_path / "again")
    assert (tmp_path / "again" / "summary.png").read_bytes() == picture  # nothing in it depends on the clock


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"other": 2}, ["above shuffled actions", "above copy last frame"]),
        (
            {"agent": 6.4},
            ["above BC trained as long, sampled", "above BC trained as long, argmax", "sampled, at least 80", "argmax, at least 80"],
        ),
        ({"scripted": 12.0}, ["sampled, at least 80", "argmax, at least 80"]),
        ({"bc": 9.0}, ["above BC, sampled", "above BC, argmax"]),
        ({"minutes": 15.1}, ["wall time"]),
        ({"gigabytes": 4.1}, ["peak memory"]),
    ],
)
def test_what_is_not_met_is_said(finished: Callable[..., Path], changes: dict[str, float], missed: list[str]) -> None:
    found = verdicts([finished(seed, **changes) for seed in range(3)])
    assert len([target for target, is_met in found.items() if not is_met]) == len(missed)
    assert all(any(word in target and not is_met for target, is_met in found.items()) for word in missed)
    assert found["at least 3 seeds of the whole way"]


def test_one_slow_run_of_three_misses_the_time_and_one_weak_run_is_counted(finished: Callable[..., Path]) -> None:
    checks = collect_results([finished(0), finished(1, minutes=16), finished(2, agent=6.3)]).checks
    by_target = {check.target: check for check in checks}
    (time,) = [check for target, check in by_target.items() if "wall time" in target]
    assert not time.is_met and time.num_runs_met == 2 and "10.00, 16.00, 10.00 minutes" in time.measured
    (way,) = [check for target, check in by_target.items() if "sampled, at least 80 %" in target]
    assert way.is_met and way.num_runs_met == 2 and way.measured.startswith("81.0 ")


def test_two_runs_are_not_three(finished: Callable[..., Path]) -> None:
    paths = [finished(0), finished(1)]
    assert [target for target, is_met in verdicts(paths).items() if not is_met] == ["at least 3 seeds of the whole way"]
    assert "2 of 2" in markdown(collect_results(paths))


def test_recordings_without_an_environment_are_not_held_to_the_demos_promises(finished: Callable[..., Path], tmp_path: Path) -> None:
    """The held-out episodes of all runs are the same: a pooled interval would count them three times."""
    own = {"env": None, "data": {"recordings": {"path": tmp_path}}}
    paths = [finished(seed, error=2 + seed, changes=own) for seed in range(3)]
    for path in paths:
        (path / "evaluation" / "agent.json").unlink()
    results = collect_results(paths)
    assert results.checks == ()
    pooled = results.figures["psnr"][TRUE_ACTIONS].pooled
    assert pooled is not None and pooled == Interval(pooled.value)  # no interval
    assert pooled.value == pytest.approx(10 * math.log10(255**2 / ((4 + 9 + 16) / 3)))
    own_episodes = collect_results([finished(3), finished(4)]).figures["psnr"][TRUE_ACTIONS].pooled
    assert own_episodes is not None and own_episodes.low is not None
    page = markdown(results)
    assert "Return in the real" not in page and "targets" not in page and "training episodes" not in page
    write_results(results, tmp_path / "out")


def test_training_episodes_stand_beside_held_out_ones_where_all_runs_scored_them(finished: Callable[..., Path]) -> None:
    paths = [finished(0), finished(1)]
    for path in paths:
        file = path / "evaluation" / "world_model.json"
        write_json(file, json.loads(file.read_text()) | {"training": world_model(1, 8)})
    results = collect_results(paths)
    assert results.figures["training_psnr"][TRUE_ACTIONS].values == [pytest.approx(20 * math.log10(255))] * 2
    assert results.figures["psnr"][TRUE_ACTIONS].values == [pytest.approx(20 * math.log10(255 / 2))] * 2
    assert "The same on training episodes" in markdown(results)
    assert "training_psnr" not in collect_results([paths[0], finished(2)]).figures


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.yaml", "seed_1: is not the folder of a run"),
        ("evaluation/world_model.json", "not finished, run: dreamer evaluate world-model --config"),
        ("evaluation/agent.json", "not finished, run: dreamer evaluate agent --config"),
        ("evaluation/run.json", "not finished, run: dreamer demo --config"),
        ("report.html", "not finished, run: dreamer report --config"),
    ],
)
def test_unfinished_runs_are_refused(finished: Callable[..., Path], file: str, said: str) -> None:
    paths = [finished(0), finished(1)]
    (paths[1] / file).unlink()
    with pytest.raises(ValueError, match=said):
        collect_results(paths)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"result": {}, "rows": [{}], "stages": {}}', '{"result": 1, "rows": 1, "stages": 1}'])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("world_model.json", "remove it and run: dreamer evaluate world-model --config .*seed_1/config.yaml"),
        ("agent.json", "remove it and run: dreamer evaluate agent --config .*seed_1/config.yaml"),
        ("run.json", "restore it, or make the run again elsewhere"),
    ],
)
def test_damaged_results_are_named_with_the_remedy(finished: Callable[..., Path], name: str, remedy: str, text: str) -> None:
    paths = [finished(0), finished(1)]
    (paths[1] / "evaluation" / name).write_text(text)
    with pytest.raises(ValueError, match=f"seed_1/evaluation/{name}: .*; {remedy}") as caught:
        collect_results(paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("world_model.json", ("result", "psnr_gaps", COPY_LAST_FRAME, "value"), None, "result.psnr_gaps.copy last frame.value: .* number"),
        ("world_model.json", ("result", "episode_sums", TRUE_ACTIONS, 0, 1), "x", "result.episode_sums.true actions.0.1: .* number"),
        ("agent.json", ("rows", 0, "result", "returns", 1), {}, "rows.0.result.returns.1: .* number"),
        ("run.json", ("hardware", "CPU"), 3, "hardware.CPU: .* string"),
        ("run.json", ("revisions",), True, "revisions: .* list"),
    ],
)
def test_a_wrong_value_in_results_is_named(
    finished: Callable[..., Path], name: str, place: tuple[str | int, ...], value: Any, said: str
) -> None:
    path = finished(0)
    file = path / "evaluation" / name
    data = node = json.loads(file.read_text())
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"evaluation/{name}: is damaged \({said}.*\); "):
        collect_results([path])


def test_runs_that_differ_in_more_than_the_seed_are_refused(finished: Callable[..., Path]) -> None:
    paths = [finished(0), finished(1, changes={"phase1": {"sequence_length": 9}})]
    with pytest.raises(ValueError, match=r"seed_1: differs from .*seed_0 in phase1\.sequence_length"):
        collect_results(paths)
    with pytest.raises(ValueError, match="has the seed 0, as"):
        collect_results([paths[0], paths[0]])
    with pytest.raises(ValueError, match="at least one finished run"):
        collect_results([])


def test_intervals_that_touch_are_not_apart() -> None:
    assert are_apart(Interval(2.0, 1.5, 2.5), Interval(1.0, 0.5, 1.4))
    assert not are_apart(Interval(2.0, 1.5, 2.5), Interval(1.0, 0.5, 1.5))
    assert not are_apart(Interval(2.0), Interval(1.0, 0.5, 1.4)) and not are_apart(Interval(2.0, 1.5, 2.5), None)


def test_the_revision_is_a_commit_or_nothing() -> None:
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("+changes")) in (40, 64)
