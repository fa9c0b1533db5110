"""What the stages do with data: imports, mixtures, relevance, baselines, and time that is added up."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.cli import PRESETS
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore
from dreamer.envs.crafter_chop import ACTION_NAMES
from dreamer.evaluation.agent import AgentResult
from dreamer.models import Agent, CausalTokenizer
from dreamer.pipeline import STAGES, Run, evaluate, run_all, run_stage, stages
from dreamer.pipeline.collect import make_any_player
from dreamer.pipeline.evaluate import RecordedMixture
from dreamer.pipeline.run import write_json
from dreamer.training.checkpoint import read_manifest, save_checkpoint
from dreamer.training.models_io import agent_info, tokenizer_info
from dreamer.training.phase2 import Phase2Config
from dreamer.training.settings import EnvConfig, RecordConfig
from dreamer.types import ActionComponent, ActionSpace
from dreamer.yaml_config import load_config


def config(run_dir: Path, **sections: object) -> DreamerConfig:
    return DreamerConfig.model_validate({"run_dir": run_dir, "device": "cpu", **sections})


def write_npy(folder: Path, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for index in range(count):
        episode = folder / f"episode_{seed}_{index}"
        episode.mkdir(parents=True)
        np.save(episode / "frames.npy", rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
        np.savez(episode / "actions.npz", keyboard=rng.integers(0, 2, (5, 8)), camera=rng.integers(0, 121, 5))
        np.save(episode / "rewards.npy", np.zeros(5))


def test_recordings_are_imported_into_the_run_and_new_ones_join_them(tmp_path: Path) -> None:
    write_npy(tmp_path / "in", 2)
    run = Run(config(tmp_path / "run", env=None, data={"recordings": {"path": tmp_path / "in", "reader": "npy"}}))
    assert run_stage(run, "record") is True
    assert run_stage(run, "record") is False
    write_npy(tmp_path / "in", 1, seed=1)
    assert run_stage(run, "record") is True
    assert len(run.episodes()) == 3 and (run.path / "config.yaml").exists()


def test_new_recordings_do_not_join_what_was_learned_from(tmp_path: Path) -> None:
    write_npy(tmp_path / "in", 2)
    run = Run(config(tmp_path / "run", env=None, data={"recordings": {"path": tmp_path / "in", "reader": "npy"}}))
    run_stage(run, "record")
    for phase, settings in {"tokenizer": {}, "phase1": {"data": {}}, "phase2": {"data": {}}}.items():  # the tokenizer: as it was
        state = {"settings": settings, "seed": 0, "num_skipped": 0}
        save_checkpoint(run.path / phase, 1, model_tensors={}, model_info={}, train_tensors={}, state=state)
    assert run_stage(run, "record") is False
    write_npy(tmp_path / "in", 1, seed=1)
    with pytest.raises(ValueError, match=r"run: phase1, phase2 learned from the episodes that are here.* another run_dir"):
        run_stage(run, "record")
    assert len(EpisodeStore(run.path / "episodes")) == 2


def test_an_episode_store_is_used_where_it_is(tmp_path: Path) -> None:
    write_npy(tmp_path / "in", 2)
    first = Run(config(tmp_path / "first", env=None, data={"recordings": {"path": tmp_path / "in", "reader": "npy"}}))
    run_stage(first, "record")
    run = Run(config(tmp_path / "run", env=None, data={"recordings": {"path": first.path / "episodes"}}))
    assert run_stage(run, "record") is False
    assert run.episodes().fingerprint() == EpisodeStore(first.path / "episodes").fingerprint()
    assert not (run.path / "episodes").exists()
    with pytest.raises(ValueError, match="env is null"):
        run_stage(run, "evaluate agent")


def test_without_an_environment_the_whole_way_leaves_out_playing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run, name=name: bool(ran.append(name)))
    monkeypatch.setattr(stages, "check_lengths", lambda run: None)  # nothing was recorded
    monkeypatch.setattr(stages, "knows_rewards", lambda run: True)
    said: list[str] = []
    stages.run_all(Run(config(tmp_path, env=None, data={"recordings": {"path": tmp_path}})), said.append)
    assert ran == [name for name in STAGES if name != "evaluate agent"]
    assert any("evaluate agent: left out, env is null" in line for line in said)


def test_the_mixture_plays_each_player_in_its_share_whatever_the_order() -> None:
    from dreamer.envs import make_env

    record = RecordConfig.model_validate({"players": [{"name": "random", "fraction": 0.25}, {"name": "scripted", "fraction": 0.75}]})
    env = make_env("crafter-chop", length=2)
    mixture = RecordedMixture(record, EnvConfig())

    def who(seed: int) -> str:
        env.reset(seed=seed)
        mixture.reset(env, seed)
        return mixture._now.name

    names = [who(seed) for seed in range(200)]
    assert 0.15 < names.count("random") / 200 < 0.35
    assert [who(seed) for seed in reversed(range(200))] == names[::-1]


def test_time_is_added_up_over_calls_and_kept_for_interrupted_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(stages.time, "monotonic", lambda: float(next(clock)))

    def interrupted(run: Run) -> bool:
        raise KeyboardInterrupt

    def fails(run: Run) -> bool:
        raise ValueError("bad")

    run = Run(config(tmp_path / "run"), "dreamer x")
    monkeypatch.setitem(STAGES, "record", lambda run: True)
    assert run_stage(run, "record")
    monkeypatch.setitem(STAGES, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(run, "record")
    monkeypatch.setitem(STAGES, "record", fails)
    with pytest.raises(ValueError, match="bad"):
        run_stage(run, "record")
    monkeypatch.setitem(STAGES, "record", lambda run: False)
    assert not run_stage(run, "record")
    spent = json.loads((run.evaluation_path / "run.json").read_text())
    assert spent["stages"]["record"]["seconds"] == 20.0 == run.seconds("record")
    assert spent["command"] == "dreamer x" and spent["hardware"]["PyTorch"]


def test_the_time_of_a_failed_or_killed_stage_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the time itself, a thread notes how far it has come: what SIGKILL leaves behind."""
    monkeypatch.setattr(stages, "BEAT", 0.01)
    run, path = Run(config(tmp_path / "run"), "dreamer x"), tmp_path / "run" / "evaluation" / "run.json"

    def works_and_fails(run: Run) -> bool:
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0 < run.seconds("record") < 10  # killed now, this would stay
        raise ValueError("bad")

    monkeypatch.setitem(STAGES, "record", works_and_fails)
    with pytest.raises(ValueError, match="bad"):
        run_stage(run, "record")
    first = run.seconds("record")
    monkeypatch.setattr(stages, "BEAT", 10.0)
    monkeypatch.setitem(STAGES, "record", lambda run: True)
    run_stage(run, "record")
    assert first < run.seconds("record") < first + 1


def test_a_report_does_not_change_who_made_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in (("record", "dreamer record"), ("report", "dreamer report")):
        monkeypatch.setitem(STAGES, name, lambda run: True)
        run_stage(Run(config(tmp_path / "run"), command), name)
    spent = Run(config(tmp_path / "run")).spent()
    assert spent["command"] == "dreamer record" and set(spent["stages"]) == {"record", "report"}


@pytest.mark.parametrize(("seconds", "expected"), [(6.0, 300), (90.0, 900)])
def test_the_long_baseline_takes_as_many_steps_and_as_long(tmp_path: Path, seconds: float, expected: int) -> None:
    from dreamer.pipeline import train

    run = Run(config(tmp_path, phase2={"train": {"steps": 500}}, phase3={"train": {"steps": 300}}))
    run.require_finished = lambda phase, steps: None
    write_json(
        run.evaluation_path / "run.json",
        {"stages": {"phase2": {"seconds": 50.0, "peak_memory_mb": 1.0}, "phase3": {"seconds": seconds, "peak_memory_mb": 1.0}}},
    )
    assert train._extra_steps(run) == expected
    fixed = Run(config(tmp_path, bc_long={"extra_steps": 7}))
    assert train._extra_steps(fixed) == 7


def test_seeds_differ_by_purpose_and_by_run(tmp_path: Path) -> None:
    runs = [Run(config(tmp_path, seed=seed)) for seed in (0, 1)]
    seeds = [run.seed(purpose) for run in runs for purpose in ("phase1", "phase2", "validation")]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert runs[0].seed("phase1") == Run(config(tmp_path / "elsewhere")).seed("phase1")


SMALL = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "time_every": 1, "context_length": 8}
MODELS: dict[str, Any] = {
    "tokenizer": {"patch_size": 4, "token_grid": (2, 2), "latent_channels": 2, "encoder": SMALL, "decoder": SMALL},
    "agent": {"dynamics": {"transformer": SMALL}, "heads": {"hidden": 8, "num_distances": 1, "num_bins": 11}},
    "phase0": {"train": {"steps": 1}},
    "phase3": {"imagination": {"rollout": {"context": 2}}},
}


def save_models(run_dir: Path, space: ActionSpace) -> dict[str, Path]:
    """A tokenizer and an agent of phase 2 that acts in ``space``, as a run leaves them; the options of the player ``agent``."""
    settings = config(run_dir, **MODELS)
    tokenizer = CausalTokenizer(settings.tokenizer, (3, 8, 8))
    agent = Agent(settings.agent, action_space=space, token_grid=(2, 2), latent_channels=2)
    for name, model, info in (
        ("tokenizer", tokenizer, tokenizer_info(tokenizer)),
        ("phase2", agent, agent_info(agent, tokenizer_fingerprint=tokenizer.fingerprint(), phase="phase2")),
    ):
        state = {"settings": {name: {"train": {"steps": 1}}}, "seed": 0, "num_skipped": 0}
        save_checkpoint(run_dir / name, 1, model_tensors=model.state_dict(), model_info=info, train_tensors={}, state=state)
    return {"checkpoint": run_dir / "phase2", "tokenizer": run_dir / "tokenizer"}


def test_an_agent_does_not_play_where_the_actions_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = save_models(tmp_path / "run", ActionSpace((ActionComponent("action", "categorical", 3),)))
    said = r"phase2: the agent's actions are action \(categorical 3\), those of the environment 'crafter-chop' action \(categorical 6\)"
    run = Run(config(tmp_path / "run", **MODELS))
    monkeypatch.setattr(evaluate, "evaluate_policy", lambda *args, **options: pytest.fail("somebody played"))
    with pytest.raises(ValueError, match=said):
        run_stage(run, "evaluate agent")
    players = [{"name": "random", "fraction": 0.5}, {"name": "agent", "options": options, "fraction": 0.5}]
    again = Run(config(tmp_path / "again", record={"players": players}))
    with pytest.raises(ValueError, match=said):
        run_stage(again, "record")
    assert not again.episodes_path.exists()


def test_an_agent_plays_where_its_actions_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_models(tmp_path, ActionSpace((ActionComponent("action", "categorical", 6, labels=ACTION_NAMES),)))
    played: list[str] = []
    result = AgentResult("made up", (1.0,), (1,), (), (0,))
    monkeypatch.setattr(evaluate, "evaluate_policy", lambda make_env, policy, **options: played.append(policy.name) or result)
    assert run_stage(Run(config(tmp_path, **MODELS)), "evaluate agent")
    assert played == ["random", "recorded players", "phase2-sampled", "phase2-argmax"]


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (ActionComponent("action", "categorical", 3, labels=("left", "right", "forward")), None),
        (ActionComponent("action", "categorical", 3), None),  # no labels: they may be the same
        (
            ActionComponent("action", "categorical", 3, labels=("left", "forward", "right")),
            r"left, forward, right\).*left, right, forward\)",
        ),
        (ActionComponent("move", "categorical", 3), r"are move \(categorical 3\).*action \(categorical 3\)"),
        (ActionComponent("action", "binary", 3), r"are action \(binary 3\)"),
        (ActionComponent("action", "continuous", 3, -1.0, 2.0), r"are action \(continuous 3 from -1 to 2\)"),
    ],
)
def test_which_actions_are_the_same(tmp_path: Path, component: ActionComponent, said: str | None) -> None:
    env = EnvConfig(name="minigrid", options={"actions": ["left", "right", "forward"]})
    options = save_models(tmp_path, ActionSpace((component,)))
    if said is None:
        assert make_any_player("agent", env, **options).name == "agent-phase2-sampled"
    else:
        with pytest.raises(ValueError, match=said):
            make_any_player("agent", env, **options)


@pytest.mark.parametrize("text", ["{}", '{"settings": {}, "seed": 0, "num_skipped": 0}', '{"settings": {"phase2": 3}, "seed": 0}'])
def test_a_damaged_state_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    """Also where the manifest says that it is whole, as somebody else's may."""
    save_models(tmp_path, ActionSpace((ActionComponent("action", "categorical", 3),)))
    run = Run(config(tmp_path))
    assert run.has("phase2")
    file = tmp_path / "phase2" / "checkpoints" / "step_00000001" / "state.json"
    file.write_text(text)
    manifest = read_manifest(file.parent)
    manifest["files"][file.name] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: is damaged .*; remove the folder of this checkpoint"):
        run.has("phase2")


def test_windows_that_fit_no_episode_are_refused_right_after_recording(tmp_path: Path) -> None:
    """Not after the hours that the stages before theirs take."""
    smoke = load_config(DreamerConfig, PRESETS / "smoke.yaml", [f"run_dir={tmp_path / 'run'}", "phase2.long_sequence_length=40"])
    with pytest.raises(ValueError, match=r"phase2\.long_sequence_length is 40; the longest episode .* has 21 frames"):
        run_all(Run(smoke), lambda text: None)
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_the_long_baseline_begins_at_a_share_of_the_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamer.pipeline import train

    seen: list[Phase2Config] = []
    monkeypatch.setattr(train, "_train_phase2", lambda run, name, start, steps, config: bool(seen.append(config)))
    made = config(tmp_path, bc_long={"extra_steps": 7, "learning_rate_scale": 0.25})
    train.train_bc_long(Run(made))
    optim, own = made.phase2.train.optim, seen[0].train.optim
    assert (own.learning_rate, own.muon_learning_rate) == (optim.learning_rate / 4, optim.muon_learning_rate / 4)
    assert own.decay_fraction == 1 and seen[0].train.steps == 7
