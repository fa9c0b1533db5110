"""``dreamer demo --preset smoke``: the whole way once, in this process, and again: nothing is left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamer.cli import main


@pytest.fixture
def run(smoke_run: Path) -> Path:
    return smoke_run


def test_every_stage_leaves_its_result(run: Path) -> None:
    for phase in ("tokenizer", "phase1", "phase2", "bc_long", "phase3"):
        assert (run / phase / "metrics.jsonl").stat().st_size > 0
        assert list((run / phase / "checkpoints").glob("step_*/model.safetensors"))
    spent = json.loads((run / "evaluation" / "run.json").read_text())
    assert list(spent["stages"])[:4] == ["record", "start", "tokenizer", "pretokenize"]
    assert spent["versions"]["torch"] and len(spent["revisions"]) == 1
    assert all(stage["seconds"] > 0 and stage["peak_memory_mb"] > 100 for stage in spent["stages"].values())
    world_model = json.loads((run / "evaluation" / "world_model.json").read_text())["result"]
    assert set(world_model["scores"]) == {"true actions", "shuffled actions", "copy last frame", "reconstruction"}
    rows = json.loads((run / "evaluation" / "agent.json").read_text())["rows"]
    roles = [(row["role"], row["mode"]) for row in rows]
    trained = [(role, mode) for role in ("bc", "bc_long", "agent") for mode in ("sampled", "argmax")]
    assert roles == [("random", None), ("recorded", None), ("scripted", None), *trained]
    assert len({tuple(row["result"]["seeds"]) for row in rows}) == 1  # everybody plays the same episodes
    mean = {row["role"]: row["result"]["mean_return"]["value"] for row in rows}
    assert mean["scripted"] > mean["random"]
    html = (run / "report.html").read_text()
    assert "claims nothing about learning" in html and "Imagination RL" in html and html.count("data:image/webp") >= 3


def test_pictures_were_drawn_while_training(run: Path) -> None:
    assert sorted(p.name for p in (run / "phase1" / "media").iterdir()) == [
        "dream_00000010.mp4",
        "dream_00000010.png",
        "dream_00000020.mp4",
        "dream_00000020.png",
    ]
    assert len(list((run / "tokenizer" / "media").glob("reconstruction_*.png"))) == 2


def test_the_baseline_trains_at_least_as_many_steps_as_phase_3(run: Path) -> None:
    def last_step(phase: str) -> int:
        return int(max(p.name for p in (run / phase / "checkpoints").glob("step_*")).removeprefix("step_"))

    assert last_step("bc_long") >= last_step("phase3") == 12


def test_running_it_again_changes_nothing_but_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[Path, bytes]:
        kept = [p for p in run.rglob("*") if p.is_file() and p.name not in ("report.html", "run.json")]
        return {p: p.read_bytes() for p in kept}

    before = contents()
    assert main(["demo", "--preset", "smoke", f"run_dir={run}"]) == 0
    assert contents() == before
    shown = capsys.readouterr().out
    assert shown.count("already done") == 9 and "PSNR" in shown and str(run / "report.html") in shown


def test_a_changed_evaluation_is_computed_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "evaluation" / "agent.json").read_bytes()
    words = ["evaluate", "agent", "--preset", "smoke", f"run_dir={run}", "evaluation.agent.num_episodes=3"]
    assert main(words) == 0 and "done" in capsys.readouterr().out
    result = json.loads((run / "evaluation" / "agent.json").read_text())
    assert len(result["rows"][0]["result"]["returns"]) == 3
    assert main([*words[:-1], "evaluation.agent.num_episodes=4"]) == 0
    assert (run / "evaluation" / "agent.json").read_bytes() == before  # evaluation is deterministic


def test_a_trained_agent_can_be_recorded(run: Path, tmp_path: Path) -> None:
    player = f"{{name: agent, options: {{checkpoint: {run / 'phase3'}, tokenizer: {run / 'tokenizer'}, mode: argmax}}}}"
    words = ["record", "--preset", "smoke", f"run_dir={tmp_path / 'b'}", f"record.players=[{player}]", "record.num_episodes=2"]
    assert main(words) == 0
    from dreamer.data import EpisodeStore

    store = EpisodeStore(tmp_path / "b" / "episodes")
    assert [info["player"] for info in store.infos] == ["agent-phase3-argmax"] * 2


@pytest.mark.slow
def test_two_seeds_are_taken_together(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["phase0.train.steps=2", "phase1.train.steps=2", "phase2.train.steps=2", "phase3.train.steps=2", "record.num_episodes=10"]
    words = [
        "demo",
        "--preset",
        "smoke",
        *few,
        f'run_dir="{tmp_path / "two seeds: 3, 4"}"',
        "--seeds",
        "3",
        "4",
        "evaluation.agent.num_episodes=3",
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "NOT met  at least 3 seeds of the whole way: 2 seeds" in capfd.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["seeds"] == [3, 4] and [r["seed"] for r in results["runs"]] == [3, 4]
    assert all(r["total_seconds"] > r["seconds"]["phase1"] > 0 and r["command"].startswith("dreamer demo") for r in results["runs"])
    page = (tmp_path / "out" / "README.md").read_text()
    assert "claims nothing about learning" in page and "--seeds 3 4" in page
    report = (tmp_path / "two seeds: 3, 4" / "seed_3" / "report.html").read_bytes()
    assert (tmp_path / "out" / "report.html").read_bytes() == report
    assert (tmp_path / "out" / "summary.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["results", str(run), "--out", str(tmp_path / "one")]) == 0
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert one["figures"]["returns"]["agent sampled"]["sd"] is None
    seeds = [str(tmp_path / "two seeds: 3, 4" / name) for name in ("seed_3", "seed_4")]
    assert main(["results", *seeds, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["figures"] == results["figures"]
    capfd.readouterr()
    assert main(["results", str(run), *seeds, "--out", str(tmp_path / "three")]) == 2
    assert "differs from" in capfd.readouterr().err and not (tmp_path / "three").exists()


def test_the_table_of_returns_tells_sampled_from_argmax(run: Path) -> None:
    html = (run / "report.html").read_text()
    for label in ("Cloning (BC)", "Cloning, trained as long", "Imagination RL"):
        for mode in ("sampled", "argmax"):
            assert html.count(f'<th scope="row">{label}, {mode}</th>') == 1
