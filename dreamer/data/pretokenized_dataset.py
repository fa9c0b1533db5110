"""Batches of windows for training, from pretokenized latents or from raw frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool

from dreamer.data.alignment import shift_actions
from dreamer.data.predecessor import open_latents
from dreamer.data.prefetch import map_ahead
from dreamer.data.store import EpisodeStore, LatentStore, split_episodes
from dreamer.data.windows import WindowSampler
from dreamer.ops.shares import own_slice
from dreamer.types import Batch, FrameBatch

T = TypeVar("T")
Ids: TypeAlias = Sequence[int] | np.ndarray
Stream: TypeAlias = Generator[T, None, None]


class PretokenizedDataset:
    """Windows of ``sequence_length`` latent steps from a latent store, or from a folder that ``open_latents`` knows.

    episodes: the episodes to draw from (default: all). Windows never cross episodes.
    """

    def __init__(self, source: LatentStore | Path | str, sequence_length: int, episodes: Ids | None = None) -> None:
        self.store = source if isinstance(source, LatentStore) else open_latents(source)
        self.sequence_length = sequence_length
        self.episodes = np.arange(len(self.store)) if episodes is None else np.asarray(episodes, np.int64)
        self._tasks, self._has_rewards = self.store.tasks, self.store.has_rewards
        self._windows = self.sampler(batch_size=1, seed=0)

    def sampler(self, *, batch_size: int, seed: int, episodes: Ids | None = None) -> WindowSampler:
        chosen = self.episodes if episodes is None else episodes
        return WindowSampler(self.store.lengths, self.sequence_length, batch_size, seed, episodes=chosen)

    def __len__(self) -> int:
        """Number of windows."""
        return self._windows.num_windows

    def __getitem__(self, index: int) -> Batch:
        """The window ``index`` as a batch of one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        episodes, starts = self._windows.windows(np.array([index]))
        return self.batch([(int(episodes[0]), int(starts[0]))])

    def batch(self, rows: Sequence[tuple[int, int]], is_relevant: Bool[np.ndarray, " B"] | None = None) -> Batch:
        """One row per (episode, start). ``is_relevant`` marks the rows that behaviour cloning learns from (default: none)."""
        arrays = self._gather(rows)
        # time first, and the actions of all rows side by side
        actions, mask = (arrays[name].reshape(len(arrays[name]), -1, *arrays[name].shape[3:]) for name in ("actions", "action_mask"))
        for name, shifted in zip(("actions", "action_mask"), shift_actions(actions, mask), strict=True):
            arrays[f"prev_{name}"] = shifted.reshape(arrays[name].shape)
        for name in ("actions", "action_mask", "prev_actions", "prev_action_mask"):
            arrays[name] = np.ascontiguousarray(arrays[name][1:].swapaxes(0, 1))
        episodes = [episode for episode, _ in rows]
        arrays |= {"task": self._tasks[episodes], "has_rewards": self._has_rewards[episodes]}
        arrays["is_relevant"] = np.zeros(len(rows), bool) if is_relevant is None else is_relevant.copy()
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(**tensors | {"latents": tensors["latents"].float()})  # PyTorch widens float16 much faster than NumPy

    def _gather(self, rows: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Latents, rewards and terminals (B, T, ...). Actions and their mask (1 + T, B, P, ...), with the step before the window, whose
        actions led to its first step; an episode's first step has none."""
        steps, out = self.sequence_length, {}
        for row, (episode, start) in enumerate(rows):
            before = min(start, 1)
            for name, array in self.store.arrays(episode, start - before, start + steps).items():
                is_action = name in ("actions", "action_mask")
                if row == 0:
                    shape = (1 + steps, len(rows)) if is_action else (len(rows), steps)
                    out[name] = np.zeros((*shape, *array.shape[1:]), array.dtype)
                if is_action:
                    out[name][1 - before :, row] = array
                else:
                    out[name][row] = array[before:]
        return out


def long_batch_size(batch_size: int, sequence_length: int, long_sequence_length: int) -> int:
    """Rows of a long batch with about as many steps as ``batch_size`` rows of ``sequence_length``; at least 1."""
    return max(1, round(batch_size * sequence_length / long_sequence_length))


def batches(
    dataset: PretokenizedDataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    relevant_fraction: float = 0.0,
    relevant_episodes: Ids | None = None,
    long: PretokenizedDataset | None = None,
    long_every: int = 8,
    prefetch: int = 2,
    num_workers: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Stream[Batch]:
    """Batches without end; ``start_step=n`` gives exactly what would have come after n batches.

    The first ``round(relevant_fraction * batch_size)`` rows are drawn from ``relevant_episodes`` and marked ``is_relevant``; the others
    are drawn uniformly from the dataset. With ``long``, every ``long_every``-th batch has fewer rows (``long_batch_size``), which come from
    there; both kinds walk through all windows of their own. ``prefetch`` batches are made ahead by ``num_workers`` threads (0 of
    either: none), whose number changes nothing in the batches. Close the iterator, or drop it, to end the threads.

    ``batch_size`` is that of the whole batch, which ``world`` processes share: process ``rank`` gets every ``world``-th row of what one
    process would get. Raises ``ValueError`` for relevant rows without relevant episodes, and if a process would be left without a row.
    """
    own = _own_rows(batch_size, rank, world)
    if not 0 <= relevant_fraction <= 1:
        raise ValueError(f"relevant_fraction is {relevant_fraction}; expected 0 to 1")
    if round(relevant_fraction * batch_size) and (relevant_episodes is None or len(relevant_episodes) == 0):
        raise ValueError(f"relevant_fraction is {relevant_fraction}, but relevant_episodes is empty; no episode reaches the task")

    def maker(source: PretokenizedDataset, num_rows: int, seed: int) -> Callable[[int], Batch]:
        num_relevant = round(relevant_fraction * num_rows)
        samplers: list[WindowSampler] = []
        if num_relevant:  # the seed differs, so that the two parts do not walk through the same order
            samplers.append(source.sampler(batch_size=num_relevant, seed=seed ^ 0x5EED, episodes=relevant_episodes))
        if num_relevant < num_rows:
            samplers.append(source.sampler(batch_size=num_rows - num_relevant, seed=seed))
        is_relevant = np.arange(num_rows) < num_relevant
        return lambda index: source.batch([row for s in samplers for row in s.rows(index)][own], is_relevant[own])

    short = maker(dataset, batch_size, seed)
    if long is None:
        return _stream(short, start_step, prefetch, num_workers)
    if long_every < 1:
        raise ValueError(f"long_every is {long_every}; expected at least 1")
    num_long_rows = long_batch_size(batch_size, dataset.sequence_length, long.sequence_length)
    _own_rows(num_long_rows, rank, world, "a batch of long rows")
    few = maker(long, num_long_rows, seed ^ 0x10E6)

    def make(step: int) -> Batch:
        num_long = step // long_every  # before this step
        return few(num_long) if (step + 1) % long_every == 0 else short(step - num_long)

    return _stream(make, start_step, prefetch, num_workers)


def frame_batches(
    store: EpisodeStore,
    *,
    batch_size: int,
    num_frames: int,
    episodes: Ids | None = None,
    seed: int,
    start_step: int = 0,
    prefetch: int = 2,
    num_workers: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Stream[FrameBatch]:
    """Windows of ``num_frames`` raw frames without end, for tokenizer training; resumes, prefetches and is shared as ``batches`` is."""
    own = _own_rows(batch_size, rank, world)
    sampler = WindowSampler(store.lengths, num_frames, batch_size, seed, episodes=episodes)

    def make(step: int) -> FrameBatch:
        rows = sampler.rows(step)[own]
        return FrameBatch(torch.from_numpy(np.stack([store.frames(e, start, start + num_frames) for e, start in rows])))

    return _stream(make, start_step, prefetch, num_workers)


def _own_rows(num_rows: int, rank: int, world: int, which: str = "a batch") -> slice:
    """Those of process ``rank``; ``ValueError`` if a process would be left without one."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}; expected 0 <= rank < world")
    most_rows(num_rows, world, which)
    return own_slice(rank, world)


def most_rows(num_rows: int, world: int, which: str = "a batch") -> int:
    """The most rows that one of ``world`` processes holds; ``ValueError`` if a process would be left without one."""
    if num_rows < world:
        raise ValueError(
            f"{which} has {num_rows} rows, and each of {world} processes needs one; enlarge train.batch_size, or start fewer processes"
        )
    return -(-num_rows // world)


def _stream(make: Callable[[int], T], start_step: int, prefetch: int, num_workers: int) -> Stream[T]:
    if min(start_step, prefetch, num_workers) < 0:
        raise ValueError(f"start_step {start_step}, prefetch {prefetch}, num_workers {num_workers}; expected at least 0 of each")
    if prefetch and num_workers:
        return map_ahead(make, start_step, num_threads=num_workers, depth=max(prefetch, num_workers))
    return (make(step) for step in itertools.count(start_step))


class PretokenizedLoader:
    """Re-iterable like a torch ``DataLoader``: each ``for`` runs one epoch of ``len(loader)`` batches and goes on where the last one
    stopped, in an order that the seed alone decides. ``step`` counts the batches given; pass it as ``start_step`` to resume."""

    def __init__(self, dataset: PretokenizedDataset, batch_size: int, seed: int, start_step: int = 0, num_workers: int = 1) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; expected at least 0 (no thread)")
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers
        self.step = start_step
        self._steps_per_epoch = dataset.sampler(batch_size=batch_size, seed=seed).steps_per_epoch

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        stream = batches(
            self.dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=self.step,
            prefetch=2 * self.num_workers,
            num_workers=self.num_workers,
        )
        with closing(stream):
            for batch in stream:
                self.step += 1
                yield batch
                if self.step % len(self) == 0:
                    return


def create_pretokenized_dataloader(
    data_path: LatentStore | Path | str,
    batch_size: int = 16,
    sequence_length: int = 5,
    split: str = "train",
    seed: int = 0,
    start_step: int = 0,
    val_fraction: float = 0.1,
    num_workers: int = 1,
) -> PretokenizedLoader:
    """A loader of windows of ``sequence_length`` latent steps (not frames). split: "train" or "val", which share no episode whatever the
    seed, or "all". num_workers: threads that make batches ahead, in the same order whatever their number; 0: none.

    ``data_path`` may also be a folder that the predecessor wrote: see ``open_latents``. Raises ``ValueError`` for an unknown split, a
    missing or damaged store, or a store that cannot be split.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'val' or 'all'")
    store = data_path if isinstance(data_path, LatentStore) else open_latents(data_path)
    episodes = None
    if split != "all":
        episodes = split_episodes(len(store), val_fraction)[0 if split == "train" else 1]
    return PretokenizedLoader(PretokenizedDataset(store, sequence_length, episodes), batch_size, seed, start_step, num_workers)
