"""What was played, kept as an episode and as a video. Memory is bounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dreamer.data import EpisodeStore, EpisodeWriter
from dreamer.data.alignment import episode_from_transitions
from dreamer.evaluation.media import encode_mp4, side_by_side
from dreamer.player.source import Picture
from dreamer.types import ActionSpace, Episode

MAX_BYTES = 128 << 20  # of frames; 64 x 64 pixels: a quarter of an hour at 10 frames a second


class Recording:
    """Frames of a dream from ``first`` on, what was done, and the real frames beside them, if any."""

    def __init__(self, first: Picture, real: Picture | None, info: dict[str, Any]) -> None:
        self.frames, self.info = [first], info
        self.real = None if real is None else [real]
        self.rows: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.is_over = False

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def is_full(self) -> bool:
        return (len(self) + 1) * self.frames[0].nbytes * (1 if self.real is None else 2) > MAX_BYTES

    def add(self, row: Float[np.ndarray, " A"], frame: Picture, real: Picture | None, reward: float, is_over: bool) -> None:
        self.frames.append(frame)
        self.rows.append(row)
        self.rewards.append(reward)
        self.is_over = is_over
        if self.real is not None and real is not None:
            self.real.append(real)

    def mp4(self, fps: float) -> bytes:
        """The dream, on the right the real environment if it was there all the time."""
        num = len(self)  # it may go on meanwhile
        dream = np.stack(self.frames[:num])
        if self.real is None or len(self.real) < num:
            return encode_mp4(dream, fps)
        return encode_mp4(side_by_side([dream, np.stack(self.real[:num])]), fps)

    def episode(self, has_rewards: bool) -> Episode:
        """In the time contract. Rewards and end are the model's opinion, which ``info`` says; without ``has_rewards`` there are none."""
        frames = np.ascontiguousarray(np.stack(self.frames).transpose(0, 3, 1, 2))
        rewards = np.array(self.rewards, np.float32) * has_rewards
        info = self.info | {"rewards": "predicted" if has_rewards else "unknown"}
        episode = episode_from_transitions(frames, np.stack(self.rows), rewards, self.is_over and has_rewards, info=info)
        return dataclasses.replace(episode, has_rewards=has_rewards)

    def store(self, path: Path, space: ActionSpace, fps: float, has_rewards: bool) -> int:
        """Append to the episode store at ``path``; returns the episode's number. ``ValueError`` for a store of other actions or frames,
        and if nothing was played."""
        if not self.rows:
            raise ValueError("the recording holds one frame and no action; play while it records")
        with EpisodeWriter(path, space, frames_per_second=fps) as writer:
            writer.add(self.episode(has_rewards))
        return len(EpisodeStore(path)) - 1
