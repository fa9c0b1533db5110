"""Batches of windows for training, from pretokenized latents or from raw frames."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool

from dreamer.data.alignment import shift_actions
from dreamer.data.prefetch import Prefetcher
from dreamer.data.store import EpisodeStore, LatentStore, split_episodes
from dreamer.data.windows import WindowSampler
from dreamer.types import Batch, FrameBatch

T = TypeVar("T")
Ids: TypeAlias = Sequence[int] | np.ndarray
Stream: TypeAlias = Prefetcher[T] | Generator[T, None, None]  # an iterator with close()


class PretokenizedDataset:
    """Windows of ``sequence_length`` latent steps from a latent store.

    episodes: the episodes to draw from (default: all). Windows never cross episodes.
    """

    def __init__(self, source: LatentStore | Path | str, sequence_length: int, episodes: Ids | None = None) -> None:
        self.store = source if isinstance(source, LatentStore) else LatentStore(source)
        self.sequence_length = sequence_length
        self.episodes = np.arange(len(self.store)) if episodes is None else np.asarray(episodes, np.int64)
        self._windows = self.sampler(batch_size=1, seed=0)

    def sampler(self, *, batch_size: int, seed: int, episodes: Ids | None = None, rank: int = 0, world: int = 1) -> WindowSampler:
        chosen = self.episodes if episodes is None else episodes
        return WindowSampler(self.store.lengths, self.sequence_length, batch_size, seed, episodes=chosen, rank=rank, world=world)

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
        parts = [self._window(episode, start) for episode, start in rows]
        relevant = np.zeros(len(rows), bool) if is_relevant is None else is_relevant
        stacked = {name: torch.from_numpy(np.stack([p[name] for p in parts])) for name in parts[0]}
        episodes = [episode for episode, _ in rows]
        task, has_rewards = torch.from_numpy(self.store.tasks[episodes]), torch.from_numpy(self.store.has_rewards[episodes])
        return Batch(**stacked, task=task, has_rewards=has_rewards, is_relevant=torch.from_numpy(relevant.copy()))

    def _window(self, episode: int, start: int) -> dict[str, np.ndarray]:
        """A window is read with the step before it, whose actions led to the window's first step."""
        before = min(start, 1)
        arrays = self.store.arrays(episode, start - before, start + self.sequence_length)
        prev_actions, prev_mask = shift_actions(arrays["actions"], arrays["action_mask"])
        arrays |= {"prev_actions": prev_actions, "prev_action_mask": prev_mask}
        arrays["latents"] = arrays["latents"].astype(np.float32, copy=False)
        return {name: array[before:] for name, array in arrays.items()}


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
    rank: int = 0,
    world: int = 1,
) -> Stream[Batch]:
    """Batches without end; ``start_step=n`` gives exactly what would have come after n batches.

    The first ``round(relevant_fraction * batch_size)`` rows are drawn from ``relevant_episodes`` and marked ``is_relevant``; the others
    are drawn uniformly from the dataset. With ``long``, every ``long_every``-th batch has fewer rows (``long_batch_size``), which come from
    there; both kinds walk through all windows of their own. ``prefetch`` batches are made ahead by a thread (0: none). Close the
    iterator, or drop it, to end the thread. Raises ``ValueError`` for relevant rows without relevant episodes.
    """
    if not 0 <= relevant_fraction <= 1:
        raise ValueError(f"relevant_fraction is {relevant_fraction}; expected 0 to 1")
    if round(relevant_fraction * batch_size) and (relevant_episodes is None or len(relevant_episodes) == 0):
        raise ValueError(f"relevant_fraction is {relevant_fraction}, but relevant_episodes is empty; no episode reaches the task")

    def maker(source: PretokenizedDataset, num_rows: int, seed: int) -> Callable[[int], Batch]:
        num_relevant = round(relevant_fraction * num_rows)
        samplers: list[WindowSampler] = []
        if num_relevant:  # the seed differs, so that the two parts do not walk through the same order
            samplers.append(source.sampler(batch_size=num_relevant, seed=seed ^ 0x5EED, episodes=relevant_episodes, rank=rank, world=world))
        if num_relevant < num_rows:
            samplers.append(source.sampler(batch_size=num_rows - num_relevant, seed=seed, rank=rank, world=world))
        is_relevant = np.arange(num_rows) < num_relevant
        return lambda index: source.batch([row for s in samplers for row in s.rows(index)], is_relevant)

    short = maker(dataset, batch_size, seed)
    if long is None:
        return _stream(short, start_step, prefetch)
    if long_every < 1:
        raise ValueError(f"long_every is {long_every}; expected at least 1")
    few = maker(long, long_batch_size(batch_size, dataset.sequence_length, long.sequence_length), seed ^ 0x10E6)

    def make(step: int) -> Batch:
        num_long = step // long_every  # before this step
        return few(num_long) if (step + 1) % long_every == 0 else short(step - num_long)

    return _stream(make, start_step, prefetch)


def frame_batches(
    store: EpisodeStore,
    *,
    batch_size: int,
    num_frames: int,
    episodes: Ids | None = None,
    seed: int,
    start_step: int = 0,
    prefetch: int = 2,
    rank: int = 0,
    world: int = 1,
) -> Stream[FrameBatch]:
    """Windows of ``num_frames`` raw frames without end, for tokenizer training; resumes and prefetches as ``batches`` does."""
    sampler = WindowSampler(store.lengths, num_frames, batch_size, seed, episodes=episodes, rank=rank, world=world)

    def make(step: int) -> FrameBatch:
        return FrameBatch(torch.from_numpy(np.stack([store.frames(e, start, start + num_frames) for e, start in sampler.rows(step)])))

    return _stream(make, start_step, prefetch)


def _stream(make: Callable[[int], T], start_step: int, prefetch: int) -> Stream[T]:
    if start_step < 0 or prefetch < 0:
        raise ValueError(f"start_step {start_step}, prefetch {prefetch}; expected at least 0")

    def items() -> Generator[T, None, None]:
        step = start_step
        while True:
            yield make(step)
            step += 1

    return Prefetcher(items(), prefetch) if prefetch else items()


class PretokenizedLoader:
    """Re-iterable like a torch ``DataLoader``: each ``for`` runs one epoch of ``len(loader)`` batches and goes on where the last one
    stopped, in an order that the seed alone decides. ``step`` counts the batches given; pass it as ``start_step`` to resume."""

    def __init__(self, dataset: PretokenizedDataset, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.step = start_step
        self._steps_per_epoch = dataset.sampler(batch_size=batch_size, seed=seed).steps_per_epoch

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        stream = batches(self.dataset, batch_size=self.batch_size, seed=self.seed, start_step=self.step)
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
) -> PretokenizedLoader:
    """A loader of windows of ``sequence_length`` latent steps (not frames). split: "train" or "val", which share no episode whatever the
    seed, or "all".

    Raises ``ValueError`` for an unknown split, a missing or damaged store, or a store that cannot be split.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'val' or 'all'")
    store = data_path if isinstance(data_path, LatentStore) else LatentStore(data_path)
    episodes = None
    if split != "all":
        episodes = split_episodes(len(store), val_fraction)[0 if split == "train" else 1]
    return PretokenizedLoader(PretokenizedDataset(store, sequence_length, episodes), batch_size, seed, start_step)
