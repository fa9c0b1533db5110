"""Held-out episodes never train, and training episodes never judge: every frame and latent is traced to its episode."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, episode_from_transitions
from dreamer.models import CausalTokenizer
from dreamer.pipeline import Run, run_stage, train
from dreamer.training import validation
from dreamer.training.loop import Trainer
from dreamer.types import ActionComponent, ActionSpace, FrameBatch

NUM_EPISODES, SIDE = 16, 16
SMALL = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "time_every": 1, "context_length": 6, "mlp_ratio": 1}
TRAIN = {"steps": 2, "batch_size": 16, "log_every": 1, "validate_every": 1, "checkpoint_every": 2}
PARTS = {name: SMALL | {"time_every": 0} for name in ("encoder", "decoder")}
SIZES: dict[str, Any] = {
    "device": "cpu",
    "env": None,
    "tokenizer": {"patch_size": 4, "token_grid": (2, 2), "latent_channels": 4, **PARTS},
    "agent": {"dynamics": {"transformer": SMALL, "max_steps": 4}, "heads": {"hidden": 8, "num_distances": 2, "num_bins": 11}},
    "phase0": {"train": TRAIN, "normalization_frames": 64},
    "phase1": {"train": TRAIN, "sequence_length": 4, "long_sequence_length": 7, "long_every": 2},
    "phase2": {"train": TRAIN, "sequence_length": 4, "long_sequence_length": 7, "long_every": 2},
    "phase3": {"train": TRAIN, "imagination": {"rollout": {"horizon": 2, "context": 2, "sampler": {"num_steps": 1}}}},
    "bc_long": {"extra_steps": 2},
    "evaluation": {"sampler": {"num_steps": 1}, "world_model": {"context": 2, "horizon": 2, "num_windows": 12, "num_clips": 1}},
}
STAGES = ("tokenizer", "pretokenize", "phase1", "phase2", "phase3", "bc_long", "evaluate world-model")


def write_episodes(path: Path) -> None:
    """Episodes of noise, in which no two frames are alike; the return of episode i is i."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, ActionSpace((ActionComponent("action", "categorical", 3),)), frames_per_second=10.0) as writer:
        for index in range(NUM_EPISODES):
            frames = rng.integers(0, 256, (9, 3, SIDE, SIDE), dtype=np.uint8)
            rewards = np.eye(8)[index % 8] * index
            writer.add(episode_from_transitions(frames, rng.integers(0, 3, (8, 1)), rewards, terminated=bool(index % 2)))


class Traces:
    """By stage: which episodes each use saw. Frames and latents are traced by their content, whatever way they took."""

    def __init__(self, run: Run) -> None:
        self.run, self.stage = run, ""
        self.seen: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._owner: dict[bytes, int] = {}
        self.learn(EpisodeStore(run.episodes_path))

    def learn(self, store: EpisodeStore | LatentStore) -> None:
        for episode in range(len(store)):
            steps = store.frames(episode) if isinstance(store, EpisodeStore) else store.latents(episode)
            for step in steps:
                assert self._owner.setdefault(step.tobytes(), episode) == episode

    def note(self, use: str, windows: Tensor) -> list[int]:
        """``windows (B T ...)``: every step of every row. Returns the episode of each row."""
        rows = [[self._owner[step.tobytes()] for step in row] for row in windows.numpy()]
        assert all(len(set(row)) == 1 for row in rows)
        self.seen[self.stage, use] += [row[0] for row in rows]
        return [row[0] for row in rows]

    def ids(self, stage: str, use: str) -> set[int]:
        return set(self.seen[stage, use])


def attach(patch: pytest.MonkeyPatch, traces: Traces) -> None:
    """Note what the steps of training, the normalisation, the validation hooks and the stores' readers are given."""
    step, fit, relevant = Trainer.train_step, CausalTokenizer.fit_normalization, train.relevant_episodes
    read_frames, read_arrays = EpisodeStore.frames, LatentStore.arrays

    def train_step(self: Trainer, batches: list[Any]) -> dict[str, Any]:
        for batch in batches:
            if isinstance(batch, FrameBatch):
                traces.note("train", batch.frames)
            else:
                traces.seen[traces.stage, "relevant"] += np.array(traces.note("train", batch.latents))[batch.is_relevant.numpy()].tolist()
        return step(self, batches)

    def fit_normalization(self: CausalTokenizer, frames: Any) -> None:
        parts = list(frames)
        traces.note("normalization", torch.cat(parts))
        fit(self, parts)

    def relevant_episodes(returns: np.ndarray, has_rewards: np.ndarray, episodes: np.ndarray, config: Any) -> np.ndarray:
        traces.seen[traces.stage, f"returns of {min(episodes)}"] += list(episodes)
        return relevant(returns, has_rewards, episodes, config)

    def watched(name: str) -> None:
        make = getattr(validation, name)

        def made(*args: Any, **options: Any) -> Any:
            for given in args:
                if isinstance(given, Tensor):
                    traces.note(name, given)
                elif isinstance(given, list):
                    for batch in given:
                        traces.note(name, batch.latents)
                elif hasattr(given, "episodes"):
                    traces.note(name, given.frames)
                    traces.note(name, given.batch.latents)
            return make(*args, **options)

        patch.setattr(validation, name, made)

    def frames(self: EpisodeStore, index: int, *place: Any) -> np.ndarray:
        traces.seen[traces.stage, "read frames"].append(index)
        return read_frames(self, index, *place)

    def arrays(self: LatentStore, index: int, *place: Any) -> dict[str, np.ndarray]:
        traces.seen[traces.stage, "read latents"].append(index)
        return read_arrays(self, index, *place)

    patch.setattr(Trainer, "train_step", train_step)
    patch.setattr(CausalTokenizer, "fit_normalization", fit_normalization)
    patch.setattr(train, "relevant_episodes", relevant_episodes)
    patch.setattr(EpisodeStore, "frames", frames)
    patch.setattr(LatentStore, "arrays", arrays)
    for name in ("validate_tokenizer", "validate_world_model", "validate_heads", "validate_dreams", "validate_imagination"):
        watched(name)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traces]:
    path = tmp_path_factory.mktemp("held_out")
    write_episodes(path / "episodes")
    data = {"recordings": {"path": path / "episodes"}, "val_fraction": 0.4, "num_val_batches": 2}
    run = Run(DreamerConfig.model_validate({**SIZES, "run_dir": path / "run", "data": data}))
    found = Traces(run)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        attach(patch, found)
        for stage in STAGES:
            found.stage = stage
            assert run_stage(run, stage)
            if stage == "pretokenize":
                found.stage = "learn"
                found.learn(run.latents(run.tokenizer()))
        yield found


def split(traces: Traces) -> tuple[set[int], set[int]]:
    train_ids, val_ids = (set(map(int, ids)) for ids in traces.run.split(NUM_EPISODES))
    assert not train_ids & val_ids and train_ids | val_ids == set(range(NUM_EPISODES)) and min(len(train_ids), len(val_ids)) >= 4
    return train_ids, val_ids


@pytest.mark.parametrize("stage", ["tokenizer", "phase1", "phase2", "phase3", "bc_long"])
def test_only_training_episodes_train(traces: Traces, stage: str) -> None:
    train_ids, _ = split(traces)
    rows = traces.seen[stage, "train"]
    assert len(rows) >= 16 and len(set(rows)) > 4 and set(rows) <= train_ids


def test_the_latents_are_normalised_on_training_frames(traces: Traces) -> None:
    train_ids, _ = split(traces)
    assert len(traces.ids("tokenizer", "normalization")) > 4 and traces.ids("tokenizer", "normalization") <= train_ids


@pytest.mark.parametrize("stage", ["phase2", "bc_long"])
def test_relevant_rows_are_the_best_of_the_training_episodes(traces: Traces, stage: str) -> None:
    """Better than their median, which the held-out episodes have no part in; the return of episode i is i."""
    sides = split(traces)
    best = {i for i in sides[0] if i >= np.median(sorted(sides[0]))}
    assert traces.ids(stage, "relevant") <= best and len(traces.ids(stage, "relevant")) > 2
    assert [traces.ids(stage, f"returns of {min(side)}") for side in sides] == list(sides)
    assert len([use for of, use in traces.seen if of == stage and use.startswith("returns of")]) == 2


VALIDATED = {
    "tokenizer": ("validate_tokenizer",),
    "phase1": ("validate_world_model", "validate_dreams"),
    "phase2": ("validate_world_model", "validate_heads"),
    "phase3": ("validate_imagination",),
    "bc_long": ("validate_world_model", "validate_heads"),
}


@pytest.mark.parametrize(("stage", "hook"), [(stage, hook) for stage, hooks in VALIDATED.items() for hook in hooks])
def test_only_held_out_episodes_validate(traces: Traces, stage: str, hook: str) -> None:
    _, val_ids = split(traces)
    assert len(traces.ids(stage, hook)) > 1 and traces.ids(stage, hook) <= val_ids


def test_nothing_else_validates(traces: Traces) -> None:
    hooks = {(stage, use) for stage, use in traces.seen if use.startswith("validate_")}
    assert hooks == {(stage, hook) for stage, hooks in VALIDATED.items() for hook in hooks}


def test_the_world_model_is_evaluated_on_held_out_episodes(traces: Traces) -> None:
    _, val_ids = split(traces)
    assert traces.ids("evaluate world-model", "read frames") == val_ids
    assert traces.ids("evaluate world-model", "read latents") == val_ids


@pytest.mark.parametrize("stage", ["tokenizer", "phase1", "phase2", "phase3", "bc_long"])
def test_each_stage_reads_the_form_of_the_data_that_was_traced(traces: Traces, stage: str) -> None:
    """What trains and what validates, and no store beside it."""
    frames, latents = traces.ids(stage, "read frames"), traces.ids(stage, "read latents")
    _, val_ids = split(traces)
    if stage == "tokenizer":
        assert frames and not latents
    else:
        assert latents and frames == (traces.ids(stage, "validate_dreams") & val_ids)
