"""What the stages do with data: imports, mixtures, relevance, baselines, and time that is added up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore
from dreamer.pipeline import STAGES, Run, run_stage, stages
from dreamer.pipeline.evaluate import RecordedMixture
from dreamer.pipeline.run import write_json
from dreamer.training.settings import EnvConfig, RecordConfig


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
