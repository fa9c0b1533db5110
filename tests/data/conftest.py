"""Small episodes, stores and a tokenizer whose latents can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer.data import EpisodeStore, EpisodeWriter, episode_from_transitions
from dreamer.types import ActionComponent, ActionSpace, Episode

SPACE = ActionSpace(
    (ActionComponent("move", "categorical", 5), ActionComponent("keys", "binary", 2), ActionComponent("turn", "continuous", 1))
)


def _episode(length: int, number: int = 0, terminated: bool = False) -> Episode:
    """Frame t of episode n is filled with 10 n + t at [0], noise elsewhere; action and reward t carry t."""
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 256, (length, 3, 4, 4), dtype=np.uint8)
    frames[:, 0, 0, 0] = (10 * number + np.arange(length)) % 256
    actions = np.zeros((length - 1, 4), np.float32)
    actions[:, 0] = np.arange(length - 1) % 5
    actions[:, 1:3] = rng.integers(0, 2, (length - 1, 2))
    actions[:, 3] = rng.uniform(-1, 1, length - 1)
    rewards = np.arange(1, length, dtype=np.float32)  # the reward that arrives with frame t is t
    return episode_from_transitions(frames, actions, rewards, terminated, task=number % 3, info={"number": number})


class PixelTokenizer:
    """The latents of step t are the first two pixels of channel 0 in the step's last frame."""

    token_grid = (2, 1)
    latent_channels = 1
    frame_shape = (3, 4, 4)
    can_decode = False
    can_stream = False

    def __init__(self, temporal_stride: int = 1, name: str = "pixels") -> None:
        self.temporal_stride, self.name = temporal_stride, name
        self.longest_clip = 0

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        length = frames.shape[1]
        self.longest_clip = max(self.longest_clip, length)
        steps = 1 + -(-(length - 1) // self.temporal_stride)
        last = (torch.arange(steps) * self.temporal_stride).clamp(max=length - 1)
        return frames[:, last, 0, 0, :2].float()[..., None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return f"{self.name}-{self.temporal_stride}"


@pytest.fixture(scope="session")
def space() -> ActionSpace:
    return SPACE


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    return _episode


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., EpisodeStore]:
    def make(lengths: list[int], name: str = "episodes", shard_episodes: int = 2, codec: str = "zlib") -> EpisodeStore:
        with EpisodeWriter(tmp_path / name, SPACE, frames_per_second=20.0, shard_episodes=shard_episodes, codec=codec) as writer:
            for number, length in enumerate(lengths):
                writer.add(_episode(length, number, terminated=number % 2 == 1))
        return EpisodeStore(tmp_path / name)

    return make


@pytest.fixture
def pixel_tokenizer() -> type[PixelTokenizer]:
    return PixelTokenizer
