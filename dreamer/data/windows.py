"""Which window comes when: a pure function of (seed, step), so resuming needs only the step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Integer

BLOCK = 4096  # places of an epoch that are permuted at once: numpy's cost is by call, not by number


class WindowSampler:
    """Draws windows of ``window`` steps, uniformly over all places where one fits inside an episode.

    Every epoch is another order of all windows, without replacement. It knows nothing of processes: where several share a batch, each
    takes its rows of the whole one, so that their number does not matter.

    lengths: steps in each episode. episodes: the episodes to draw from (default: all).
    Raises ``ValueError`` if no episode is long enough; warns with the number of those that are not.
    """

    def __init__(
        self,
        lengths: Integer[np.ndarray, " K"],
        window: int,
        batch_size: int,
        seed: int,
        *,
        episodes: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        if window < 1 or batch_size < 1:
            raise ValueError(f"window {window}, batch_size {batch_size}; expected at least 1 of each")
        self.episodes = np.arange(len(lengths)) if episodes is None else np.asarray(episodes, np.int64)
        if len(self.episodes) == 0 or self.episodes.min() < 0 or self.episodes.max() >= len(lengths):
            raise ValueError(
                f"episodes to draw from: {self.episodes.tolist()[:8]}...; expected some of the {len(lengths)} that the store holds"
            )
        self.batch_size, self.seed = batch_size, seed
        lengths = lengths[self.episodes]
        counts = np.maximum(lengths - window + 1, 0)
        self._ends = np.cumsum(counts)
        self.num_windows = int(self._ends[-1])
        if self.num_windows == 0:
            raise ValueError(f"a window of {window} is longer than every episode (the longest has {lengths.max()}); use a shorter window")
        self._order = lru_cache(maxsize=8)(self._permuted_block)  # neighbouring batches share their blocks
        if short := int((counts == 0).sum()):
            warnings.warn(f"{short} of {len(counts)} episodes are shorter than the window of {window} and are left out", stacklevel=2)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least 1."""
        return max(1, self.num_windows // self.batch_size)

    def windows(self, index: Integer[np.ndarray, " K"]) -> tuple[Integer[np.ndarray, " K"], Integer[np.ndarray, " K"]]:
        """The episodes and starts of the windows ``index`` in [0, num_windows), in the order of the store."""
        which = np.searchsorted(self._ends, index, side="right")
        before = np.where(which > 0, self._ends[which - 1], 0)
        return self.episodes[which], index - before

    def rows(self, step: int) -> list[tuple[int, int]]:
        """The (episode, start) of each row of the batch at ``step`` >= 0."""
        position = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(position, self.num_windows)
        blocks, offsets = np.divmod(places, BLOCK)
        index = np.empty(self.batch_size, np.int64)
        for epoch, block in set(zip(epochs.tolist(), blocks.tolist(), strict=True)):
            here = (epochs == epoch) & (blocks == block)
            index[here] = self._order(epoch, block)[offsets[here]]
        episodes, starts = self.windows(index)
        return list(zip(episodes.tolist(), starts.tolist(), strict=True))

    def _permuted_block(self, epoch: int, block: int) -> Integer[np.ndarray, " K"]:
        """The windows at the places ``BLOCK * block`` and on of an epoch."""
        places = np.arange(BLOCK * block, min(BLOCK * (block + 1), self.num_windows))
        return permute(places, self.num_windows, (self.seed, epoch))


def permute(index: Integer[np.ndarray, " K"], size: int, key: tuple[int, ...]) -> Integer[np.ndarray, " K"]:
    """The places of ``index`` in a pseudo-random permutation of [0, size), without building it (a million hours have too many
    windows): a Feistel network on a power of four >= size, walked until the value falls inside."""
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    rounds = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(6, np.uint64)
    out, outside = index.astype(np.uint64), np.ones(len(index), bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(half), out[outside] & mask
        for constant in rounds:
            left, right = right, left ^ (_mix(right + constant) & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
