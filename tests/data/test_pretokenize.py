"""Episodes to latents: what comes out, and that it comes out the same whatever happened on the way."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av.error
import numpy as np
import pytest
import torch

from dreamer.data import EpisodeStore, EpisodeWriter, LatentStore, PretokenizedDataset, Recordings, pretokenize
from dreamer.data.pretokenize import encode_frames
from dreamer.data.shards import shard_paths
from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig

ROOT = Path(__file__).parents[2]
LENGTHS = [5, 9, 3, 17, 4]


class Interrupted(Exception):
    pass


def contents(path) -> dict[str, bytes]:
    """Hidden files are what killed writers leave behind."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if not p.name.startswith(".")}


@pytest.fixture
def summing_tokenizer(pixel_tokenizer):
    class SummingTokenizer(pixel_tokenizer):
        """Each latent is the sum of the pixels of this and all earlier steps: right in pieces only if the past is remembered."""

        can_stream = True
        longest_piece = 0

        def new_cache(self, batch_size, part):
            assert part == "encoder"
            return {"sum": torch.zeros(batch_size, 1, 2, 1), "frames": 0}

        def encode(self, frames, cache=None):
            cache = self.new_cache(len(frames), "encoder") if cache is None else cache
            is_later = cache["frames"] > 0
            assert not is_later or (cache["frames"] - 1) % self.temporal_stride == 0
            pictures = torch.cat([frames[:, :1], frames], 1) if is_later else frames  # a later piece has no first frame of its own
            latents = cache["sum"] + super().encode(pictures)[:, int(is_later) :].cumsum(1)
            cache["sum"], cache["frames"] = latents[:, -1:], cache["frames"] + frames.shape[1]
            self.longest_piece = max(self.longest_piece, frames.shape[1])
            return latents

    return SummingTokenizer


@pytest.fixture
def write_npy():
    def write(folder, length, number=0, num_rewards=None):
        folder.mkdir(parents=True)
        frames = np.zeros((length, 4, 4, 3), np.uint8)
        frames[:, 0, 0, 0] = 10 * number + np.arange(length)
        np.save(folder / "frames.npy", frames)
        np.savez(folder / "actions.npz", keyboard=np.zeros((length, 8), np.int64), camera=np.full(length, 60))
        np.save(folder / "rewards.npy", np.ones(length if num_rewards is None else num_rewards))
        return folder

    return write


def test_stride_1_by_hand(make_store, pixel_tokenizer, tmp_path):
    store, tokenizer = make_store(LENGTHS), pixel_tokenizer()
    latents = pretokenize(store, tokenizer, tmp_path / "l")
    assert latents.lengths.tolist() == LENGTHS
    assert latents.actions_per_step == latents.temporal_stride == 1
    for number, length in enumerate(LENGTHS):
        assert latents.latents(number)[:, 0, 0].tolist() == [10 * number + t for t in range(length)]
        arrays = latents.arrays(number)
        assert arrays["rewards"].tolist() == list(range(length))
        assert arrays["actions"][:-1, 0, 0].tolist() == [t % 5 for t in range(length - 1)]
        assert arrays["action_mask"][:, 0].tolist() == [True] * (length - 1) + [False]
        assert arrays["terminals"].any() == (number % 2 == 1)


def test_stride_3_by_hand(make_store, pixel_tokenizer, tmp_path):
    latents = pretokenize(make_store(LENGTHS), pixel_tokenizer(3), tmp_path / "l")
    assert latents.lengths.tolist() == [3, 4, 2, 7, 2]
    assert latents.latents(3)[:, 0, 0].tolist() == [30, 33, 36, 39, 42, 45, 46]  # the last step is partial
    assert latents.arrays(3)["rewards"].tolist() == [0, 6, 15, 24, 33, 42, 16]
    assert latents.arrays(0)["actions"][:, :, 0].tolist() == [[0, 1, 2], [3, 0, 0], [0, 0, 0]]  # all of them
    assert latents.arrays(0)["action_mask"].tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_one_action_a_step_by_hand(make_store, pixel_tokenizer, tmp_path):
    """linspace(0, F - 1, T): of 5 frames in 3 steps those at 0 2 4, of 17 in 7 those at 0 2.7 5.3 8 10.7 13.3 16."""
    latents = pretokenize(make_store(LENGTHS), pixel_tokenizer(3), tmp_path / "l", actions="linspace")
    assert (latents.actions_per_step, latents.temporal_stride, latents.extra["pretokenize"]["actions"]) == (1, 3, "linspace")
    assert latents.arrays(0)["actions"][:, :, 0].tolist() == [[0], [2], [0]]
    assert latents.arrays(0)["action_mask"].tolist() == [[True], [True], [False]]
    assert latents.arrays(3)["actions"][:-1, 0, 0].tolist() == [t % 5 for t in (0, 2, 5, 8, 10, 13)]
    batch = PretokenizedDataset(latents, 3).batch([(3, 1)])
    assert batch.actions.shape == (1, 3, 1, 4) and batch.prev_actions[0, :, 0, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("batch_frames", [3, 4, 7, 256])
@pytest.mark.parametrize("batch_episodes", [1, 2, 5])
def test_long_episodes_are_streamed(make_store, summing_tokenizer, tmp_path, batch_frames, batch_episodes):
    """Pieces, and shorter neighbours in the batch, change nothing."""
    tokenizer = summing_tokenizer(3)
    settings = {"batch_frames": batch_frames, "batch_episodes": batch_episodes}
    latents = pretokenize(make_store(LENGTHS), tokenizer, tmp_path / "l", **settings)
    for number, length in enumerate(LENGTHS):
        seen = [10 * number + t for t in [*range(0, length - 1, 3), length - 1]]
        assert latents.latents(number)[:, 0, 0].tolist() == np.cumsum(seen).tolist()
    assert tokenizer.longest_piece <= batch_frames
    assert latents.extra["pretokenize"] == {"actions": "all", **settings}


@pytest.mark.parametrize("layout", ["aligned", "free"])
def test_pieces_of_the_causal_tokenizer_are_as_the_whole(layout):
    network = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=2, time_every=2, context_length=6)
    config = CausalTokenizerConfig(token_grid=(2, 2), latent_channels=4, layout=layout, encoder=network, decoder=network)
    tokenizer = CausalTokenizer(config, (3, 16, 16)).eval()
    episodes = [np.random.default_rng(n).integers(0, 256, (n, 3, 16, 16), dtype=np.uint8) for n in (40, 23)]
    whole = [encode_frames(tokenizer, [frames], 64)[0] for frames in episodes]
    together = encode_frames(tokenizer, episodes, 11)
    apart = np.concatenate([encode_frames(tokenizer, [part], 64)[0] for part in np.split(episodes[0], [11, 22, 33])])
    for a, b in zip(whole, together, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-4
    assert np.abs(whole[0] - apart).max() > 1e-3  # the past counts


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_an_interrupted_run_goes_on_and_ends_the_same(make_store, pixel_tokenizer, tmp_path, stop_after):
    store = make_store(LENGTHS)
    pretokenize(store, pixel_tokenizer(), tmp_path / "whole", shard_episodes=2)

    def interrupt(done, total):
        assert total == 5
        if done == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretokenize(store, pixel_tokenizer(), tmp_path / "parts", shard_episodes=2, progress=interrupt)
    calls = []
    pretokenize(store, pixel_tokenizer(), tmp_path / "parts", shard_episodes=2, progress=lambda *a: calls.append(a))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    finished = (stop_after - 1) // 2 * 2  # episodes in finished groups, which were not made again
    assert calls == [(i, 5) for i in range(finished + 1, 6)]


KILLED = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from dreamer.data import Recordings, pretokenize
from dreamer.models import CausalTokenizer, CausalTokenizerConfig, TransformerConfig

torch.set_num_threads(1)
torch.manual_seed(0)
network = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=2, time_every=2, context_length=4)
tokenizer = CausalTokenizer(CausalTokenizerConfig(token_grid=(2, 2), patch_size=2, encoder=network, decoder=network), (3, 4, 4)).eval()
data, out = map(Path, sys.argv[1:])

def start(name, **settings):
    if pid := os.fork():
        return pid
    try:
        pretokenize(Recordings(data, "npy"), tokenizer, out / name, shard_episodes=2, batch_frames=8, **settings)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def end(pid):
    assert os.waitpid(pid, 0)[1] == 0

def num_shards():
    return len(list((out / "killed").glob("shard-*")))

end(start("whole"))
chance = random.Random(0)
for number in (0, 0, 1, 2, 4, 5, 7, 10, 11):
    pid = start("killed")
    while num_shards() < number:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(num_shards())
end(start("killed"))
for pid in [start("shared", shard=(i, 3)) for i in range(3)]:
    end(pid)
"""


def test_killed_processes_and_several_at_once_end_in_the_same_bytes(write_npy, tmp_path):
    for number in range(23):
        write_npy(tmp_path / "data" / f"r{number:02}", 12 + number % 5, number, num_rewards=3 if number in (4, 22) else None)
    words = [sys.executable, "-c", KILLED, str(tmp_path / "data"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(0 < int(line) < 12 for line in done.stdout.split())  # some were killed in the middle
    whole = contents(tmp_path / "out" / "whole")
    assert len(whole) == 12 + 3  # store.json, sources.json and quarantine.json
    assert contents(tmp_path / "out" / "killed") == whole
    assert contents(tmp_path / "out" / "shared") == whole
    assert len(LatentStore(tmp_path / "out" / "killed")) == 21


def test_a_part_of_the_groups_is_no_store_to_train_from(make_store, pixel_tokenizer, tmp_path):
    store, path = make_store(LENGTHS), tmp_path / "l"
    part = pretokenize(store, pixel_tokenizer(), path, shard=(1, 2), shard_episodes=2)
    assert part.finished == {1} and not part.is_complete and part.lengths.tolist() == LENGTHS[2:4]
    with pytest.raises(ValueError, match="incomplete: 1 of 3 groups of episodes are there; run pretokenize again"):
        PretokenizedDataset(path, 2)
    assert LatentStore(path, allow_partial=True).finished == {1}
    pretokenize(store, pixel_tokenizer(), path, shard=(0, 2), shard_episodes=2)
    assert LatentStore(path).lengths.tolist() == LENGTHS
    for shard in [(2, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="expected i of n with 0 <= i < n"):
            pretokenize(store, pixel_tokenizer(), path, shard=shard, shard_episodes=2)


def test_a_grown_store_is_continued_and_its_last_group_made_again(make_store, make_episode, pixel_tokenizer, space, tmp_path):
    store = make_store(LENGTHS)
    first = pretokenize(store, pixel_tokenizer(), tmp_path / "l", shard_episodes=2)
    before = [path.read_bytes() for path in shard_paths(tmp_path / "l")]
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(make_episode(6, 5))
    with pytest.raises(Interrupted):
        pretokenize(EpisodeStore(store.path), pixel_tokenizer(), tmp_path / "l", shard_episodes=2, progress=raise_interrupted)
    with pytest.raises(ValueError, match="incomplete: 2 of 3 groups"):
        LatentStore(tmp_path / "l")
    latents = pretokenize(EpisodeStore(store.path), pixel_tokenizer(), tmp_path / "l", shard_episodes=2)
    assert latents.lengths.tolist() == [*LENGTHS, 6]
    assert [path.read_bytes() for path in shard_paths(tmp_path / "l")][:2] == before[:2]
    assert latents.source_fingerprint != first.source_fingerprint
    pretokenize(EpisodeStore(store.path), pixel_tokenizer(), tmp_path / "new", shard_episodes=2)
    assert contents(tmp_path / "l") == contents(tmp_path / "new")


def raise_interrupted(done, total):
    raise Interrupted


def test_new_recordings_join_at_the_end_whatever_their_names(write_npy, pixel_tokenizer, tmp_path):
    for number, name in enumerate(["b", "d", "f"]):
        write_npy(tmp_path / "in" / name, 4 + number)
    settings = {"shard_episodes": 2}
    pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l", max_episodes=2, **settings)
    first = shard_paths(tmp_path / "l")[0].read_bytes()
    write_npy(tmp_path / "in" / "a", 9)
    latents = pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l", **settings)
    assert latents.lengths.tolist() == [4, 5, 9, 6]
    assert shard_paths(tmp_path / "l")[0].read_bytes() == first
    (tmp_path / "in" / "d").rename(tmp_path / "d")
    with pytest.raises(ValueError, match="holds latents of other episodes than .*in, where 'd' is not found"):
        pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l", **settings)


def test_recordings_are_read_without_an_episode_store(write_npy, pixel_tokenizer, tmp_path):
    write_npy(tmp_path / "in" / "a", 5, 1)
    source = Recordings(tmp_path / "in", "npy", {"frames_per_second": 12.5})
    latents = pretokenize(source, pixel_tokenizer(), tmp_path / "l", about={"tokenizer": {"kind": "pixels"}})
    assert latents.latents(0)[:, 0, 0].tolist() == [10, 11, 12, 13, 14]
    assert latents.arrays(0)["rewards"].tolist() == [0, 1, 1, 1, 1] and latents.has_rewards.tolist() == [True]
    assert latents.tokenizer_fingerprint == "pixels-1" and latents.extra == {
        "frames_per_second": 12.5,
        "source": {"reader": "npy", "options": {"frames_per_second": 12.5}},
        "tokenizer": {"kind": "pixels"},
        "pretokenize": {"actions": "all", "batch_frames": 256, "batch_episodes": 1},
    }


def test_broken_recordings_are_left_out_with_the_reason(write_npy, pixel_tokenizer, tmp_path):
    root = tmp_path / "in"
    for number, name in enumerate("abcdef"):
        write_npy(root / name, 5, number, num_rewards=3 if name == "b" else None)
    array = (root / "c" / "frames.npy").read_bytes()
    (root / "c" / "frames.npy").write_bytes(array[:200])
    (root / "e" / "rewards.npy").write_bytes(b"")
    (root / "f" / "actions.npz").unlink()
    latents = pretokenize(Recordings(root, "npy"), pixel_tokenizer(), tmp_path / "l", shard_episodes=2)
    assert latents.is_complete and latents.latents(1)[0, 0, 0] == 30 and len(latents) == 2
    listed = json.loads((tmp_path / "l" / "quarantine.json").read_text())
    assert listed == latents.quarantine and [entry["name"] for entry in listed] == list("bcef")
    assert listed[0]["reason"].startswith("b: got lengths that disagree: 5 frames, 5 actions, 3 rewards")
    assert listed[1]["reason"].startswith("c/frames.npy: cannot be read (its header promises uint8 (5, 4, 4, 3)")
    assert listed[2]["reason"].startswith("e/rewards.npy: cannot be read")
    assert str(tmp_path) not in json.dumps(listed)

    with pytest.raises(ValueError, match="lengths that disagree"):  # in the first group, which was finished
        pretokenize(Recordings(root, "npy"), pixel_tokenizer(), tmp_path / "l", shard_episodes=2, strict=True)
    before = [path.read_bytes() for path in shard_paths(tmp_path / "l")]
    (root / "c" / "frames.npy").write_bytes(array)
    latents = pretokenize(Recordings(root, "npy"), pixel_tokenizer(), tmp_path / "l", shard_episodes=2)  # repaired: its group is made again
    after = [path.read_bytes() for path in shard_paths(tmp_path / "l")]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]
    assert latents.latents(1)[0, 0, 0] == 20 and [entry["name"] for entry in latents.quarantine] == list("bef")


@pytest.mark.parametrize(
    ("error", "is_machine"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (av.error.OSError(errno.EMFILE, "Too many open files"), True),
        (av.error.TimeoutError(errno.ETIMEDOUT, "Connection timed out"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("cannot reshape"), False),
        (av.error.PermissionError(errno.EPERM, "Operation not permitted"), False),  # of streams that make no sense
        (av.error.OSError(errno.EIO, "Input/output error"), False),
        (av.error.InvalidDataError(1094995529, "Invalid data"), False),
        (ValueError("17 frames"), False),
    ],
)
def test_only_the_machines_errors_end_the_work(error, is_machine, write_npy, pixel_tokenizer, tmp_path, monkeypatch):
    for number, name in enumerate("ab"):
        write_npy(tmp_path / "in" / name, 5, number)
    source = Recordings(tmp_path / "in", "npy")
    read = source.reader.read

    def fail(recording):
        if recording.name != "b":
            return read(recording)
        try:
            raise error
        except Exception as cause:
            raise ValueError(f"{recording}: cannot be read") from cause

    monkeypatch.setattr(source.reader, "read", fail)
    if is_machine:
        with pytest.raises(OSError, match="b could not be read now .*run again"):
            pretokenize(source, pixel_tokenizer(), tmp_path / "l")
        assert not shard_paths(tmp_path / "l")
    else:
        assert [entry["name"] for entry in pretokenize(source, pixel_tokenizer(), tmp_path / "l").quarantine] == ["b"]


@pytest.mark.parametrize("place", ["start", "end"])
def test_a_change_that_keeps_the_size_is_seen(write_npy, pixel_tokenizer, tmp_path, place):
    folder = write_npy(tmp_path / "in" / "a", 3000)  # 144 kB: more than what is read at its ends
    before = pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l").fingerprint()
    again = pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l").fingerprint()
    frames = np.load(folder / "frames.npy")
    step = 0 if place == "start" else 2999
    frames[step, 0, 0, 0] = 77
    np.save(folder / "frames.npy", frames)
    latents = pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l")
    assert again == before != latents.fingerprint() and latents.latents(0)[step, 0, 0] == 77


def test_shards_may_be_read_by_whom_the_umask_lets(make_store, pixel_tokenizer, tmp_path):
    store = make_store(LENGTHS)
    mask = os.umask(0o027)
    try:
        pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "l").iterdir()}
    assert set(modes.values()) == {0o640} and "shard-000000.safetensors" in modes


def test_other_actions_are_refused_in_words(make_store, pixel_tokenizer, tmp_path):
    store = make_store(LENGTHS)
    for stride in (1, 3):
        path = tmp_path / f"l{stride}"
        pretokenize(store, pixel_tokenizer(stride), path, actions="linspace")
        with pytest.raises(ValueError, match=f"l{stride}: was made with the actions 'linspace', not 'all'; set data.actions=linspace"):
            pretokenize(store, pixel_tokenizer(stride), path)


def test_a_broken_recording_may_be_moved_away_as_its_reason_says(write_npy, pixel_tokenizer, tmp_path):
    """Then the others go on, and the group that it belongs to is made again as if it were still there."""
    for name, value in zip("abc", (1, 2, 3), strict=True):
        write_npy(tmp_path / "in" / name, 5, value)
    (tmp_path / "in" / "b" / "rewards.npy").write_bytes(b"")
    arguments = {"tokenizer": pixel_tokenizer(), "path": tmp_path / "l", "shard_episodes": 4}
    before = pretokenize(Recordings(tmp_path / "in", "npy"), **arguments)
    (tmp_path / "in" / "b").rename(tmp_path / "b")
    assert pretokenize(Recordings(tmp_path / "in", "npy"), **arguments).fingerprint() == before.fingerprint()
    write_npy(tmp_path / "in" / "d", 5, 4)
    after = pretokenize(Recordings(tmp_path / "in", "npy"), **arguments)
    assert len(before) == 2 and len(after) == 3 and after.quarantine == before.quarantine
    shutil.rmtree(tmp_path / "in" / "c")
    with pytest.raises(ValueError, match=r"where 'c' is not found \(1 of 4 are missing\)"):
        pretokenize(Recordings(tmp_path / "in", "npy"), **arguments)


def test_broken_videos_and_rows_are_left_out(write_vpt, pixel_tokenizer, tmp_path):
    for name in ("cut", "fine", "rows", "small"):
        write_vpt(tmp_path / "in" / f"{name}.mp4", [{}] * 6)
    video = tmp_path / "in" / "cut.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    rows = tmp_path / "in" / "rows.jsonl"
    rows.write_text(rows.read_text()[:-30])
    (tmp_path / "in" / "small.mp4").write_bytes(b"")
    (tmp_path / "in" / "lonely.mp4").write_bytes(b"")
    source = Recordings(tmp_path / "in", "vpt", {"size": [4, 4]})
    assert len(source.skipped) == 1 and "lonely.mp4: no .jsonl beside it" in source.skipped[0]
    latents = pretokenize(source, pixel_tokenizer(), tmp_path / "l")
    assert latents.lengths.tolist() == [6] and not latents.has_rewards.any()
    assert {entry["name"]: entry["reason"].split(" (")[0] for entry in latents.quarantine} == {
        "cut.mp4": "cut.mp4: cannot be decoded after 0 frames",
        "rows.mp4": "rows.mp4: rows.jsonl: line 6 cannot be read",
        "small.mp4": "small.mp4: cannot be decoded after 0 frames",
    }
    with pytest.raises(ValueError, match=r"cut\.mp4: cannot be decoded"):
        pretokenize(source, pixel_tokenizer(), tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "quarantine.json").exists()


def test_if_nothing_can_be_read_nothing_is_written(write_npy, pixel_tokenizer, tmp_path):
    for name in "ab":
        write_npy(tmp_path / "in" / name, 5, num_rewards=3)
    with pytest.raises(ValueError, match=r"in: none of 2 episodes can be read; the first: a: got lengths that disagree"):
        pretokenize(Recordings(tmp_path / "in", "npy"), pixel_tokenizer(), tmp_path / "l")
    assert not (tmp_path / "l").exists()


def test_whose_rewards_are_known_comes_along(make_store, make_episode, pixel_tokenizer, space, tmp_path):
    store = make_store(LENGTHS)
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(dataclasses.replace(make_episode(6, 5), has_rewards=False))
    store = EpisodeStore(store.path)
    assert not store.episode(len(LENGTHS)).has_rewards
    latents = pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    assert latents.has_rewards.tolist() == [True] * len(LENGTHS) + [False]
    dataset = PretokenizedDataset(latents, 2)
    assert dataset.batch([(0, 0), (len(LENGTHS), 0)]).has_rewards.tolist() == [True, False]


def test_max_episodes(make_store, pixel_tokenizer, tmp_path):
    store = make_store(LENGTHS)
    assert len(pretokenize(store, pixel_tokenizer(), tmp_path / "l", max_episodes=2)) == 2
    assert len(pretokenize(store, pixel_tokenizer(), tmp_path / "l", max_episodes=1)) == 2  # what is there stays
    assert len(pretokenize(store, pixel_tokenizer(), tmp_path / "l")) == 5
    with pytest.raises(ValueError, match="max_episodes 0; expected at least 1"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", max_episodes=0)


def test_what_does_not_belong_together_is_refused(make_store, pixel_tokenizer, tmp_path):
    store = make_store(LENGTHS)
    pretokenize(store, pixel_tokenizer(), tmp_path / "l")
    before = contents(tmp_path / "l")
    with pytest.raises(ValueError, match="made by tokenizer pixels-1, not by other-1"):
        pretokenize(store, pixel_tokenizer(name="other"), tmp_path / "l")
    with pytest.raises(ValueError, match="holds latents of other episodes"):
        pretokenize(make_store(LENGTHS[::-1], name="reversed"), pixel_tokenizer(), tmp_path / "l")
    with pytest.raises(ValueError, match=r"dtype is 'float32'; cannot append with 'float16'"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", dtype="float16")
    with pytest.raises(ValueError, match="was made with the actions 'all', not 'linspace'"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", actions="linspace")
    with pytest.raises(ValueError, match="shard_episodes is 32; cannot go on with 8"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", shard_episodes=8)
    assert contents(tmp_path / "l") == before


def test_a_tokenizer_of_other_shapes_is_refused(make_store, pixel_tokenizer, tmp_path):
    store, tokenizer = make_store(LENGTHS), pixel_tokenizer()
    tokenizer.frame_shape = (3, 8, 8)
    with pytest.raises(ValueError, match=r"frames of shape \(3, 4, 4\); the tokenizer takes \(3, 8, 8\)"):
        pretokenize(store, tokenizer, tmp_path / "l")
    assert not (tmp_path / "l").exists()
    tokenizer = pixel_tokenizer()
    tokenizer.token_grid = (3, 1)
    with pytest.raises(ValueError, match=r"gave latents of shape \(1, 5, 2, 1\); expected \(1, 5, 3, 1\)"):
        pretokenize(store, tokenizer, tmp_path / "l")
    with pytest.raises(ValueError, match="of batch_frames at least the temporal stride 3"):
        pretokenize(store, pixel_tokenizer(3), tmp_path / "l", batch_frames=2)
    with pytest.raises(ValueError, match="batch_episodes is 2; a tokenizer that cannot stream"):
        pretokenize(store, pixel_tokenizer(), tmp_path / "l", batch_episodes=2)


def test_nan_latents_are_refused(make_store, pixel_tokenizer, tmp_path):
    class Broken(pixel_tokenizer):
        def encode(self, frames):
            return super().encode(frames) / 0 * 0

    with pytest.raises(ValueError, match=r"episode 0 of task 0, checksum \w+: latents holds NaN"):
        pretokenize(make_store(LENGTHS), Broken(), tmp_path / "l")
    assert not shard_paths(tmp_path / "l")
