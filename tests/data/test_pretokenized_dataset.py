import itertools
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer.data import (
    LatentStore,
    LatentWriter,
    PretokenizedDataset,
    batches,
    create_pretokenized_dataloader,
    frame_batches,
    pretokenize,
    split_episodes,
)
from dreamer.data.pretokenized_dataset import long_batch_size
from dreamer.types import Batch

LENGTHS = [6, 9, 5, 10, 7, 8]


@pytest.fixture
def make_latents(make_store, pixel_tokenizer, tmp_path):
    def make(lengths=LENGTHS, stride=1) -> LatentStore:
        return pretokenize(make_store(lengths), pixel_tokenizer(stride), tmp_path / f"latents{stride}", batch_frames=64)

    return make


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def take(stream, number: int) -> list[Batch]:
    return list(itertools.islice(stream, number))


def test_a_window_in_the_middle_by_hand(make_latents):
    """Episode 1 has frames 10 .. 18, action t is t % 5, reward t is t."""
    batch = PretokenizedDataset(make_latents(), 4).batch([(1, 2)])
    assert batch.latents.shape == (1, 4, 2, 1)
    assert batch.latents[0, :, 0, 0].tolist() == [12, 13, 14, 15]
    assert batch.actions[0, :, 0, 0].tolist() == [2, 3, 4, 0]
    assert batch.prev_actions[0, :, 0, 0].tolist() == [1, 2, 3, 4]  # action 1 led into the window
    assert batch.prev_action_mask[0, :, 0].tolist() == [True] * 4
    assert batch.rewards[0].tolist() == [2, 3, 4, 5]
    assert not batch.is_relevant.any()
    assert batch.task.tolist() == [1]


def test_the_first_and_the_last_window_by_hand(make_latents):
    batch = PretokenizedDataset(make_latents(), 4).batch([(1, 0), (1, 5)], np.array([True, False]))
    assert batch.latents[:, :, 0, 0].tolist() == [[10, 11, 12, 13], [15, 16, 17, 18]]
    assert batch.prev_actions[0, :, 0, 0].tolist() == [0, 0, 1, 2]
    assert batch.prev_action_mask[:, :, 0].tolist() == [[False, True, True, True], [True] * 4]
    assert batch.action_mask[:, :, 0].tolist() == [[True] * 4, [True, True, True, False]]  # nothing is known at the last frame
    assert batch.terminals.tolist() == [[False] * 4, [False, False, False, True]]
    assert batch.is_relevant.tolist() == [True, False]


def test_a_window_of_chunks_by_hand(make_latents):
    """Stride 3, episode 3 of 12 frames (30 .. 41): steps end at frames 0, 3, 6, 9 and the rest."""
    batch = PretokenizedDataset(make_latents([6, 9, 5, 12], stride=3), 3, episodes=[3]).batch([(3, 1)])
    assert batch.latents[0, :, 0, 0].tolist() == [33, 36, 39]
    assert batch.actions[0, :, :, 0].tolist() == [[3, 4, 0], [1, 2, 3], [4, 0, 0]]
    assert batch.action_mask[0].tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert batch.prev_actions[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert batch.rewards[0].tolist() == [1 + 2 + 3, 4 + 5 + 6, 7 + 8 + 9]


def test_windows_never_cross_episodes(make_latents):
    dataset = PretokenizedDataset(make_latents(), 5)
    assert len(dataset) == sum(n - 4 for n in LENGTHS)
    for window in range(len(dataset)):
        row = dataset[window]
        values = row.latents[0, :, 0, 0]
        assert values.diff().tolist() == [1, 1, 1, 1]
        assert values[0] // 10 == values[-1] // 10
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_starting_at_a_step_is_an_exact_resume(make_latents, prefetch):
    dataset = PretokenizedDataset(make_latents(), 4)
    options = {"batch_size": 4, "seed": 5, "relevant_fraction": 0.5, "relevant_episodes": [1, 3]}
    whole = take(batches(dataset, **options), 12)
    resumed = take(batches(dataset, **options, start_step=5, prefetch=prefetch), 7)
    assert all(equal(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    assert not equal(whole[0], whole[1])


def test_relevant_rows_come_from_relevant_episodes(make_latents):
    dataset = PretokenizedDataset(make_latents(), 4)
    uniform = set()
    for batch in take(batches(dataset, batch_size=4, seed=0, relevant_fraction=0.5, relevant_episodes=[1]), 40):
        assert batch.is_relevant.tolist() == [True, True, False, False]
        assert set((batch.latents[:2, 0, 0, 0] // 10).tolist()) == {1}
        uniform |= set(batch.latents[2:, 0, 0, 0].tolist())
    assert len(uniform) > len(LENGTHS) * 2
    (all_relevant,) = take(batches(dataset, batch_size=3, seed=0, relevant_fraction=1.0, relevant_episodes=[1, 2]), 1)
    assert all_relevant.is_relevant.all()
    with pytest.raises(ValueError, match="relevant_episodes is empty"):
        batches(dataset, batch_size=4, seed=0, relevant_fraction=0.5, relevant_episodes=[])
    with pytest.raises(ValueError, match="relevant_fraction is 1.5"):
        batches(dataset, batch_size=4, seed=0, relevant_fraction=1.5, relevant_episodes=[1])


def test_relevant_and_uniform_rows_walk_different_orders(make_latents):
    dataset = PretokenizedDataset(make_latents(), 4, episodes=[1, 3])
    for batch in take(batches(dataset, batch_size=8, seed=0, relevant_fraction=0.5, relevant_episodes=[1, 3]), 3):
        assert not torch.equal(batch.latents[:4], batch.latents[4:])


@pytest.mark.parametrize(("batch_size", "short", "long", "rows"), [(16, 8, 16, 8), (16, 8, 20, 6), (4, 5, 9, 2), (2, 4, 40, 1)])
def test_long_batches_hold_about_as_many_steps(batch_size, short, long, rows):
    assert long_batch_size(batch_size, short, long) == rows


def test_every_nth_batch_is_long(make_latents):
    store = make_latents()
    short, long = PretokenizedDataset(store, 3), PretokenizedDataset(store, 6)
    got = take(batches(short, batch_size=4, seed=0, long=long, long_every=3, prefetch=0), 9)
    shapes = [tuple(batch.latents.shape[:2]) for batch in got]
    assert shapes == [(4, 3), (4, 3), (2, 6)] * 3
    plain = take(batches(short, batch_size=4, seed=0, prefetch=0), 6)
    assert all(equal(a, b) for a, b in zip([b for i, b in enumerate(got) if i % 3 < 2], plain, strict=True))  # none is left out
    all_long = take(batches(short, batch_size=4, seed=0, long=long, long_every=1, prefetch=0), 3)
    assert all(equal(a, b) for a, b in zip(all_long, got[2::3], strict=True))
    with pytest.raises(ValueError, match="long_every is 0"):
        batches(short, batch_size=4, seed=0, long=long, long_every=0)


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_long_batches_resume_exactly_and_keep_their_relevant_rows(make_latents, start):
    store = make_latents()
    options = {
        "batch_size": 8,
        "seed": 5,
        "relevant_fraction": 0.5,
        "relevant_episodes": [1, 3],
        "long": PretokenizedDataset(store, 7),
        "long_every": 3,
    }
    whole = take(batches(PretokenizedDataset(store, 3), **options), 10)
    resumed = take(batches(PretokenizedDataset(store, 3), **options, start_step=start), 10 - start)
    assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))
    assert whole[2].is_relevant.tolist() == [True, True, False]  # 8 * 3 / 7 rows
    assert set((whole[2].latents[:2, 0, 0, 0] // 10).tolist()) <= {1, 3}


def test_damage_found_by_the_thread_reaches_the_consumer(make_latents):
    store = make_latents()
    path = store.shards[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stream = batches(PretokenizedDataset(store.path, 4), batch_size=8, seed=0)
    with pytest.raises(ValueError, match=rf"{path.name}: damaged"):
        take(stream, 50)


def test_latents_come_as_float32(make_store, pixel_tokenizer, tmp_path):
    store = pretokenize(make_store([5, 6]), pixel_tokenizer(), tmp_path / "half", dtype="float16")
    assert store.latents(0).dtype == np.float16
    assert PretokenizedDataset(store, 3)[0].latents.dtype == torch.float32


def test_dataloader_splits_without_leak(make_latents):
    store = make_latents([6] * 20)
    seen = {}
    for split in ("train", "val"):
        loader = create_pretokenized_dataloader(data_path=store.path, batch_size=2, sequence_length=5, split=split, seed=len(split))
        seen[split] = {int(first) for batch in loader for first in batch.latents[:, 0, 0, 0] // 10}
    train, val = split_episodes(20, 0.1)
    assert seen == {"train": set(train.tolist()), "val": set(val.tolist())}
    with pytest.raises(ValueError, match="split is 'test'"):
        create_pretokenized_dataloader(store, split="test")


def test_dataloader_runs_epochs_and_resumes(make_latents):
    store = make_latents()
    loader = create_pretokenized_dataloader(store, batch_size=4, sequence_length=4, split="all")
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == sum(n - 3 for n in LENGTHS) // 4
    assert not equal(first[0], second[0])
    resumed = create_pretokenized_dataloader(store, batch_size=4, sequence_length=4, split="all", start_step=3)
    assert all(equal(a, b) for a, b in zip(first[3:], list(resumed), strict=True))
    assert resumed.step == len(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_the_number_of_workers_changes_nothing(make_latents, num_workers):
    """Also for an epoch that is left in its middle and resumed with another number of workers."""
    store = make_latents()
    options = {"batch_size": 4, "sequence_length": 4, "split": "all", "seed": 3}
    alone = create_pretokenized_dataloader(store, **options)
    whole = [*alone, *alone]
    loader = create_pretokenized_dataloader(store, **options, num_workers=num_workers)
    several = [batch for batch, _ in zip(loader, range(3), strict=False)]
    resumed = create_pretokenized_dataloader(store, **options, num_workers=num_workers + 1, start_step=3)
    several += [*resumed, *resumed]
    assert len(several) == len(whole) > 8
    assert all(equal(a, b) for a, b in zip(whole, several, strict=True))
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    with pytest.raises(ValueError, match="num_workers is -1"):
        create_pretokenized_dataloader(store, num_workers=-1)


def test_batches_are_what_the_store_holds(make_latents):
    """Every row of every batch, gathered, against the rows of the store, one by one."""
    dataset = PretokenizedDataset(make_latents([20, 9, 31], stride=3), 3)
    rows = [(0, 0), (2, 4), (1, 1), (0, 4), (2, 0)]
    batch = dataset.batch(rows)
    for row, (episode, start) in enumerate(rows):
        found = dataset.store.arrays(episode)
        window = slice(start, start + 3)
        for name in ("latents", "actions", "action_mask", "rewards", "terminals"):
            assert np.array_equal(getattr(batch, name)[row].numpy(), found[name][window]), name
        for t in range(3):
            before = start + t - 1
            known = found["action_mask"][before] if before >= 0 else np.zeros(3, bool)
            actions = found["actions"][before] if before >= 0 else np.zeros((3, 4), np.float32)
            assert np.array_equal(batch.prev_action_mask[row, t].numpy(), known)
            assert np.array_equal(batch.prev_actions[row, t].numpy(), actions)
    assert all(value.is_contiguous() for value in vars(batch).values())


STATM = Path("/proc/self/statm")


def private_bytes() -> int:
    """What the process holds in RAM, PyTorch's tensors among it, without the files that are mapped: those the system may drop."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def write_large(path, space):
    """A store of 32 MB, whose windows of 5 steps are 160 MB when all are taken."""
    steps, rng = 125, np.random.default_rng(0)
    with LatentWriter(
        path,
        action_space=space,
        tokenizer_fingerprint="any",
        token_grid=(16, 16),
        latent_channels=16,
        temporal_stride=1,
        source_fingerprint="",
    ) as writer:
        for _ in range(16):
            latents = rng.standard_normal((steps, 256, 16), np.float32)
            actions = np.zeros((steps, 1, 4), np.float32)
            writer.add(latents, actions, np.ones((steps, 1), bool), np.zeros(steps, np.float32), np.zeros(steps, bool))


def test_memory_stays_flat_over_an_epoch(tmp_path, space):
    """With a bound of 8 MB on what Python and NumPy hold at any time."""
    write_large(tmp_path, space)
    loader = create_pretokenized_dataloader(tmp_path, batch_size=8, sequence_length=5, split="all", num_workers=2)
    assert sum(shard.arrays["latents"].nbytes for shard in loader.dataset.store.shards) > 32e6
    tracemalloc.start()
    rows, peaks = 0, []
    for batch in loader:
        rows += len(batch.latents)
        if rows % 160 == 0:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert rows == len(loader) * 8 > 1900 and len(peaks) > 10
    assert max(peaks) < 8e6
    assert max(peaks[len(peaks) // 2 :]) < 1.3 * max(peaks[: len(peaks) // 2])


@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc/self/statm")
def test_the_process_stays_flat_over_an_epoch(tmp_path, space):
    """PyTorch's memory is not Python's: seen from outside. The first batches fill buffers; from then on less than 24 MB may be added, where
    batches that were kept would add over 100."""
    write_large(tmp_path, space)
    loader = create_pretokenized_dataloader(tmp_path, batch_size=8, sequence_length=5, split="all", num_workers=2)

    def growth(kept: list[Batch] | None) -> int:
        sizes = []
        for number, batch in enumerate(loader):
            if kept is not None:
                kept.append(batch)
            if number >= 40:
                sizes.append(private_bytes())
        assert len(sizes) > 150
        return max(sizes) - sizes[0]

    assert growth(None) < 24e6
    assert growth([]) > 100e6  # such a leak would be seen


def test_frame_batches(make_store):
    store = make_store(LENGTHS)
    first = take(frame_batches(store, batch_size=3, num_frames=2, episodes=[1, 4], seed=0), 6)
    for batch in first:
        assert batch.frames.shape == (3, 2, 3, 4, 4)
        marks = batch.frames[:, :, 0, 0, 0]
        assert (marks[:, 1] - marks[:, 0] == 1).all()
        assert set((marks[:, 0] // 10).tolist()) <= {1, 4}
    again = take(frame_batches(store, batch_size=3, num_frames=2, episodes=[1, 4], seed=0, start_step=2), 4)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(first[2:], again, strict=True))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_batches_of_one(make_latents, world):
    """Whatever their number, and also where it does not divide the rows: every kind of row falls evenly to all of them."""
    latents = make_latents()
    options = {
        "batch_size": 12,
        "seed": 3,
        "start_step": 2,
        "relevant_fraction": 0.5,
        "relevant_episodes": [1, 3],
        "long": PretokenizedDataset(latents, 8),
        "long_every": 3,
        "prefetch": 0,
    }
    dataset = PretokenizedDataset(latents, 4)
    whole = take(batches(dataset, **options), 12)
    parts = [take(batches(dataset, **options, rank=rank, world=world), 12) for rank in range(world)]
    assert {len(batch) for batch in whole} == {12, 6}
    for step, batch in enumerate(whole):
        assert all(equal(parts[rank][step], batch[rank::world]) for rank in range(world))
        relevant = [int(part[step].is_relevant.sum()) for part in parts]
        assert max(relevant) - min(relevant) <= 1


def test_processes_share_the_frames_of_one(make_store):
    store = make_store(LENGTHS)
    options = {"batch_size": 7, "num_frames": 2, "seed": 1, "prefetch": 0}
    whole = take(frame_batches(store, **options), 5)
    for rank in range(3):
        own = take(frame_batches(store, **options, rank=rank, world=3), 5)
        assert all(torch.equal(a.frames, b.frames[rank::3]) for a, b in zip(own, whole, strict=True))


def test_a_process_without_a_row_is_refused(make_latents, make_store):
    latents = make_latents()
    dataset, long = PretokenizedDataset(latents, 4), PretokenizedDataset(latents, 8)
    with pytest.raises(ValueError, match="a batch has 2 rows, and each of 3 processes needs one; enlarge train.batch_size, or start fewer"):
        batches(dataset, batch_size=2, seed=0, rank=0, world=3)
    with pytest.raises(ValueError, match="a batch of long rows has 2 rows, and each of 3 processes needs one"):
        batches(dataset, batch_size=4, seed=0, long=long, rank=2, world=3)
    with pytest.raises(ValueError, match="a batch has 1 rows"):
        next(frame_batches(make_store(LENGTHS), batch_size=1, num_frames=2, seed=0, rank=1, world=2))
    with pytest.raises(ValueError, match="rank 3 of 3; expected 0 <= rank < world"):
        batches(dataset, batch_size=8, seed=0, rank=3, world=3)
