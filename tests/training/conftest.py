"""A tiny run whose data is made up: frames with a dot that the action moves, a reward where it touches the right edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.config import DreamerConfig
from dreamer.data import EpisodeWriter, episode_from_transitions
from dreamer.pipeline import Run
from dreamer.types import ActionComponent, ActionSpace, Episode

SPACE = ActionSpace((ActionComponent("action", "categorical", 3, labels=("left", "stay", "right")),))


def dot_episode(rng: np.random.Generator, length: int) -> Episode:
    place, frames, actions, rewards = int(rng.integers(8)), [], [], []
    for _ in range(length):
        frame = np.full((3, 16, 16), 60, np.uint8)
        frame[:, 6:10, 2 * place : 2 * place + 2] = 230
        frames.append(frame)
        action = int(rng.integers(3))
        place = min(max(place + action - 1, 0), 7)
        actions.append([action])
        rewards.append(float(place == 7))
    return episode_from_transitions(np.stack(frames), np.array(actions)[:-1], np.array(rewards)[:-1], terminated=bool(rng.integers(2)))


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode store of 12 episodes of 10 to 14 frames, 16 x 16 pixels."""
    path, rng = tmp_path_factory.mktemp("dots") / "episodes", np.random.default_rng(0)
    with EpisodeWriter(path, SPACE, frames_per_second=10.0) as writer:
        for _ in range(12):
            writer.add(dot_episode(rng, int(rng.integers(10, 15))))
    return path


def tiny(run_dir: Path, episodes: Path, **changes: Any) -> DreamerConfig:
    """Settings for the dots; ``changes`` are sections, merged one level deep."""
    small = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2, "context_length": 6, "mlp_ratio": 1}
    train = {"steps": 7, "batch_size": 4, "log_every": 2, "validate_every": 3, "checkpoint_every": 3}
    train["optim"] = {"warmup_steps": 2, "learning_rate": 1e-3, "optimizer": "muon"}
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "device": "cpu",
        "env": None,
        "data": {"recordings": {"path": episodes}, "val_fraction": 0.3, "num_val_batches": 1},
        "tokenizer": {
            "patch_size": 4,
            "token_grid": (2, 2),
            "latent_channels": 4,
            "encoder": small | {"num_layers": 1, "time_every": 0},
            "decoder": small | {"num_layers": 1, "time_every": 0},
        },
        "agent": {
            "dynamics": {"transformer": small, "num_registers": 1, "max_steps": 4},
            "heads": {"hidden": 16, "num_distances": 2, "num_bins": 11, "bin_range": 3.0},
        },
        "phase0": {"train": train, "normalization_frames": 32},
        "phase1": {"train": train, "sequence_length": 5, "long_sequence_length": 8, "long_every": 3},
        "phase2": {"train": train, "sequence_length": 5, "long_sequence_length": 8, "long_every": 2},
        "phase3": {
            "train": train,
            "imagination": {"updates_per_rollout": 2, "rollout": {"horizon": 3, "context": 2, "sampler": {"num_steps": 2}}},
        },
        "bc_long": {"extra_steps": 7},
        "evaluation": {"sampler": {"num_steps": 2}, "world_model": {"context": 2, "horizon": 3, "num_windows": 4, "num_clips": 1}},
    }
    for name, section in changes.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    return DreamerConfig.model_validate(values)


class Formulas:
    """What the heads' losses are made of, written out for one state: actions of a choice of 3 and 2 keys, and 11 two-hot bins."""

    NUM_BINS, BIN_RANGE = 11, 3.0
    BINS = tuple(math.copysign(math.expm1(abs(x)), x) for x in (-3.0 + 0.6 * i for i in range(11)))

    @staticmethod
    def log_sigmoid(x: Tensor) -> Tensor:
        return -torch.log1p(torch.exp(-x))

    @staticmethod
    def log_softmax(logits: Tensor) -> Tensor:
        return logits - torch.log(torch.exp(logits).sum())

    def log_prob(self, parameters: Tensor, action: Tensor) -> Tensor:
        """ln pi of one action: 3 logits of the choice, then one of each key."""
        total = self.log_softmax(parameters[:3])[int(action[0])]
        for key in range(2):
            logit = parameters[3 + key]
            total = total + self.log_sigmoid(logit if action[1 + key] == 1 else -logit)
        return total

    def cross_entropy(self, logits: Tensor, scalar: float) -> Tensor:
        """Between a scalar, told by the two bins around it, and the predicted bins."""
        log_p = self.log_softmax(logits)
        below = max(i for i in range(self.NUM_BINS - 1) if self.BINS[i] <= scalar)
        above_weight = (scalar - self.BINS[below]) / (self.BINS[below + 1] - self.BINS[below])
        return -(1 - above_weight) * log_p[below] - above_weight * log_p[below + 1]


@pytest.fixture(scope="session")
def formulas() -> Formulas:
    return Formulas()


@pytest.fixture
def make_run(dots: Path) -> Callable[..., Run]:
    def make(run_dir: Path, **changes: Any) -> Run:
        return Run(tiny(run_dir, dots, **changes))

    return make
