import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dreamer.data import EpisodeStore, EpisodeWriter, shards, split_episodes
from dreamer.data.shards import Shard, shard_paths, write_shard
from dreamer.types import ActionComponent, ActionSpace, Episode

FIELDS = ("frames", "actions", "action_mask", "rewards", "terminals")


def same(a: Episode, b: Episode) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype for f in FIELDS)
    return arrays and (a.task, a.info) == (b.task, b.info)


@pytest.mark.parametrize("codec", ["zlib", "raw"])
def test_round_trip(make_store, make_episode, space, codec):
    store = make_store([5, 9, 3, 7, 4], codec=codec)
    assert store.num_episodes == len(store) == 5
    assert store.lengths.tolist() == [5, 9, 3, 7, 4]
    assert store.action_space == space
    assert store.frame_shape == (3, 4, 4)
    assert store.fps == 20
    assert store.returns.tolist() == [10, 36, 3, 21, 6]
    assert store.tasks.tolist() == [0, 1, 2, 0, 1]
    assert store.infos[3] == {"number": 3}
    assert len(shard_paths(store.path)) == 3  # two episodes a shard
    for number, length in enumerate([5, 9, 3, 7, 4]):
        assert same(store.episode(number), make_episode(length, number, terminated=number % 2 == 1))


@pytest.mark.parametrize("codec", ["zlib", "raw"])
def test_windows_of_frames(make_store, make_episode, codec):
    store = make_store([5, 9], codec=codec)
    frames = make_episode(9, 1).frames
    for start in range(10):
        for stop in range(start, 10):
            assert np.array_equal(store.frames(1, start, stop), frames[start:stop])


@pytest.mark.parametrize(("episode", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 3, 6), (0, -1, 2), (0, 3, 2)])
def test_what_does_not_exist_is_refused(make_store, episode, start, stop):
    with pytest.raises(ValueError, match=r"no episode|has length 5"):
        make_store([5, 9]).frames(episode, start, stop)


arrays = st.builds(
    lambda frames, seed, terminated: (frames, seed, terminated),
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.just(3), st.just(2), st.just(5))),
    st.integers(0, 1000),
    st.booleans(),
)


@given(st.lists(arrays, min_size=1, max_size=5), st.sampled_from(["zlib", "raw"]), st.integers(1, 3))
def test_any_episodes_come_back_bit_for_bit(tmp_path_factory, episodes, codec, shard_episodes):
    space = ActionSpace((ActionComponent("move", "categorical", 7), ActionComponent("turn", "continuous", 2, -3.0, 3.0)))
    made = []
    for frames, seed, terminated in episodes:
        rng, length = np.random.default_rng(seed), len(frames)
        mask = rng.random(length) < 0.7
        actions = np.concatenate([rng.integers(0, 7, (length, 1)), rng.uniform(-3, 3, (length, 2))], 1).astype(np.float32) * mask[:, None]
        rewards = np.append(0, rng.normal(size=length - 1)).astype(np.float32)
        terminals = np.arange(length) == (length - 1 if terminated else -1)
        made.append(Episode(frames, actions, mask, rewards, terminals, seed, {"seed": seed, "name": "x"}))
    path = tmp_path_factory.mktemp("any")
    with EpisodeWriter(path, space, frames_per_second=10.0, codec=codec, shard_episodes=shard_episodes) as writer:
        for episode in made:
            writer.add(episode)
    store = EpisodeStore(path)
    assert all(same(store.episode(i), episode) for i, episode in enumerate(made))
    store.verify()


def test_reopening_appends(make_store, make_episode, space):
    store = make_store([5, 9, 3])
    before = [p.read_bytes() for p in shard_paths(store.path)]
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(make_episode(6, 3))
    again = EpisodeStore(store.path)
    assert again.lengths.tolist() == [5, 9, 3, 6]
    assert same(again.episode(3), make_episode(6, 3))
    assert [p.read_bytes() for p in shard_paths(store.path)][:2] == before
    assert again.fingerprint(3) == store.fingerprint() != again.fingerprint()


def test_other_settings_cannot_be_appended(make_store, make_episode, space):
    path = make_store([5]).path
    with pytest.raises(ValueError, match=r"store\.json: frames_per_second is 20\.0; cannot append with 30\.0"):
        EpisodeWriter(path, space, frames_per_second=30.0)
    with pytest.raises(ValueError, match=r"store\.json: action_space is"):
        EpisodeWriter(path, ActionSpace(space.components[:1]), frames_per_second=20.0)
    with EpisodeWriter(path, space, frames_per_second=20.0) as writer:
        episode = make_episode(5)
        with pytest.raises(ValueError, match=r"frames of shape \[3, 4, 2\]; this store holds \[3, 4, 4\]"):
            writer.add(dataclasses.replace(episode, frames=episode.frames[..., :2]))
    assert EpisodeStore(path).num_episodes == 1


def test_two_writers_share_a_store(make_episode, space, tmp_path):
    with (
        EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0, shard_episodes=1) as one,
        EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0, shard_episodes=1) as two,
    ):
        for number in range(3):
            one.add(make_episode(4, 2 * number))
            two.add(make_episode(4, 2 * number + 1))
    assert [i["number"] for i in EpisodeStore(tmp_path / "s").infos] == [0, 1, 2, 3, 4, 5]


def test_a_writer_that_was_overtaken_takes_the_next_number(make_episode, space, tmp_path, monkeypatch):
    """Both look which number is free, then both write: neither may replace the other's shard."""
    one = EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0)
    two = EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0)
    one.add(make_episode(4, 0))
    one.flush()
    one.add(make_episode(4, 1))
    two.add(make_episode(4, 2))
    look = shards.shard_paths

    def overtaken(path):
        found = look(path)
        monkeypatch.setattr(shards, "shard_paths", look)
        two.flush()
        return found

    monkeypatch.setattr(shards, "shard_paths", overtaken)
    one.flush()
    assert [i["number"] for i in EpisodeStore(tmp_path / "s").infos] == [0, 2, 1]
    assert not list((tmp_path / "s").glob(".*"))


def test_what_was_added_before_an_exception_is_kept(make_episode, space, tmp_path):
    with pytest.raises(RuntimeError), EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0) as writer:
        writer.add(make_episode(4))
        raise RuntimeError
    assert EpisodeStore(tmp_path / "s").num_episodes == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.array([0, 1, np.nan], np.float32)}, r"rewards\[2\] is not finite"),
        ({"rewards": np.array([1, 1, 1], np.float32)}, r"rewards\[0\] is 1\.0; expected 0"),
        ({"terminals": np.array([False, True, False])}, r"terminals\[1\] of 3 is True"),
        ({"action_mask": np.array([True, False, False])}, "unknown are not zero"),
        (
            {"actions": np.array([[9, 0, 0, 0]] * 3, np.float32), "action_mask": np.ones(3, bool)},
            r"'move' has values in \[9, 9\]; expected \[0, 4\]",
        ),
        ({"actions": np.zeros((3, 7), np.float32)}, r"actions is float32 \(3, 7\); expected float32 \(3, 4\)"),
        ({"info": {"x": float("nan")}}, "info of an episode"),
        ({"info": {"x": object()}}, "info of an episode"),
    ],
)
def test_episodes_that_break_the_contract_are_refused(make_episode, space, tmp_path, change, message):
    episode = make_episode(3)
    episode.actions[:2, 0] = 1
    with EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0) as writer:
        writer.add(make_episode(4))
        with pytest.raises(ValueError, match=message):
            writer.add(dataclasses.replace(episode, **change))
    assert EpisodeStore(tmp_path / "s").lengths.tolist() == [4]


KILLED_WRITER = """
import os, signal, sys
import numpy as np
from dreamer.data import EpisodeWriter, EpisodeStore, shards
store = EpisodeStore(sys.argv[1])
writer = EpisodeWriter(sys.argv[1], store.action_space, frames_per_second=20.0, shard_episodes=1)
writer.add(store.episode(0))
if sys.argv[2] == "before it gets its name":
    os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:  # in the middle of the bytes
    def partly(arrays, path, metadata):
        path.write_bytes(b"0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    shards.save_file = partly
writer.add(store.episode(1))
"""


@pytest.mark.parametrize("moment", ["before it gets its name", "while writing"])
def test_a_killed_writer_loses_only_its_unfinished_shard(make_store, make_episode, space, moment):
    store = make_store([5, 9])
    process = subprocess.run([sys.executable, "-c", KILLED_WRITER, store.path, moment], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = list(store.path.glob(".*.tmp"))
    assert len(left) == 1
    assert EpisodeStore(store.path).lengths.tolist() == [5, 9, 5]
    with EpisodeWriter(store.path, space, frames_per_second=20.0) as writer:
        writer.add(make_episode(7))
    assert EpisodeStore(store.path).lengths.tolist() == [5, 9, 5, 7]
    assert left[0].exists()  # it could belong to a living writer
    os.utime(left[0], (time.time() - 7200,) * 2)
    EpisodeWriter(store.path, space, frames_per_second=20.0)
    assert not left[0].exists()


def read_all(path) -> list[Episode]:
    store = EpisodeStore(path)
    return [store.episode(i) for i in range(len(store))]


@pytest.fixture(scope="module", params=["zlib", "raw"])
def shard(request, tmp_path_factory, make_episode, space):
    """A shard of two episodes, and its bytes."""
    path = tmp_path_factory.mktemp("damaged") / "store"
    with EpisodeWriter(path, space, frames_per_second=20.0, codec=request.param) as writer:
        writer.add(make_episode(5, 0))
        writer.add(make_episode(9, 1))
    (file,) = shard_paths(path)
    return file, file.read_bytes()


@given(data=st.data())
def test_damage_is_found_and_named(shard, make_episode, data):
    file, good = shard
    place = data.draw(st.integers(0, len(good) - 1))
    is_cut = data.draw(st.booleans())
    file.write_bytes(good[:place] if is_cut else good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :])
    try:
        found = read_all(file.parent)
    except ValueError as error:
        assert str(file) in str(error)
    else:  # only the blanks that pad the header can change unseen
        assert not is_cut
        assert len(found) == 2
        assert same(found[0], make_episode(5, 0))
        assert same(found[1], make_episode(9, 1))


def test_a_shard_of_another_store_is_refused(make_store, space, make_episode, tmp_path):
    store = make_store([5, 9])
    with EpisodeWriter(tmp_path / "other", space, frames_per_second=30.0) as writer:
        writer.add(make_episode(4))
    shutil.copy(shard_paths(tmp_path / "other")[0], store.path / "shard-000001.safetensors")
    with pytest.raises(ValueError, match=r"shard-000001\.safetensors: belongs to another store"):
        EpisodeStore(store.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "latents", "format": 1}', '{"kind": "episodes", "format": 1}'])
def test_a_broken_store_file_is_named(make_store, text):
    store = make_store([5])
    (store.path / "store.json").write_text(text)
    with pytest.raises(ValueError, match=r"store\.json"):
        EpisodeStore(store.path)


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no episodes store here"):
        EpisodeStore(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file: is a file"):
        EpisodeWriter(tmp_path / "file", ActionSpace((ActionComponent("a", "binary", 1),)), frames_per_second=1.0)


def test_a_full_disk_is_noticed_before_writing(make_store, make_episode, space, monkeypatch):
    store = make_store([5, 9])
    files = sorted(p.name for p in store.path.iterdir())
    usage = namedtuple("usage", "total used free")
    writer = EpisodeWriter(store.path, space, frames_per_second=20.0, shard_episodes=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(OSError, match=r"too little disk: 1\.0 MiB needed, 0\.0 MiB free"):
        writer.add(make_episode(6))
    assert sorted(p.name for p in store.path.iterdir()) == files
    monkeypatch.undo()
    writer.flush()  # nothing was lost: the episode waits
    assert EpisodeStore(store.path).lengths.tolist() == [5, 9, 6]


def test_a_failed_write_leaves_nothing_behind(make_store, make_episode, space, monkeypatch):
    store = make_store([5, 9])
    writer = EpisodeWriter(store.path, space, frames_per_second=20.0)
    writer.add(make_episode(6))

    def full(arrays, path, metadata):
        path.write_bytes(b"partly")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamer.data.shards.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert not list(store.path.glob(".*.tmp"))
    assert EpisodeStore(store.path).num_episodes == 2


def test_large_shards_are_cut_by_size(make_episode, space, tmp_path):
    writer = EpisodeWriter(tmp_path / "s", space, frames_per_second=20.0)
    writer.shard_bytes = 1000
    for number in range(3):
        writer.add(make_episode(20, number))
    assert len(shard_paths(tmp_path / "s")) == 3


def test_a_frame_cannot_unpack_to_more_than_its_size(make_store):
    store = make_store([5])
    store.frame_shape = (3, 4, 2)  # as a forged store.json could say
    with pytest.raises(ValueError, match=r"a frame of 25 bytes; expected 24"):
        store.frames(0)


def test_split_is_by_index_and_never_empty():
    for num in range(2, 80):
        train, val = split_episodes(num, 0.1, seed=3)
        assert len(train) and len(val)
        assert sorted([*train, *val]) == list(range(num))
    train, val = split_episodes(5000, 0.1)
    assert 400 < len(val) < 600
    assert not np.array_equal(val, split_episodes(5000, 0.1, seed=1)[1])


@given(st.integers(2, 200), st.integers(0, 200), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_is_stable_under_append(num, more, fraction, seed):
    train, val = split_episodes(num, fraction, seed)
    later_train, later_val = split_episodes(num + more, fraction, seed)
    assert set(train.tolist()) <= set(later_train.tolist())
    assert set(val.tolist()) <= set(later_val.tolist())


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="1 episode"):
        split_episodes(1, 0.1)
    with pytest.raises(ValueError, match="val_fraction is 0.0"):
        split_episodes(10, 0.0)


def test_a_forged_header_is_refused(make_store):
    store = make_store([5])
    path = shard_paths(store.path)[0]
    shard = Shard(path)
    for change in ({"length": -5}, {"length": "5"}, {"num_bytes": 10**9}, {"info": []}, {"length": 6}):
        header = json.loads(json.dumps(shard.header))
        header["episodes"][0] |= change
        arrays = {k: v.copy() for k, v in shard.arrays.items()}
        path.unlink()
        write_shard(path, arrays, header)
        with pytest.raises(ValueError, match=r"shard-000000\.safetensors: damaged"):
            EpisodeStore(store.path)


def test_a_leftover_that_vanishes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes its file, or removes the same leftover."""
    leftover = tmp_path / ".shard.1.tmp"
    leftover.touch()

    def now() -> float:
        leftover.unlink()
        return 1e12

    monkeypatch.setattr(shards, "time", SimpleNamespace(time=now))
    shards.remove_stale_files(tmp_path)
    assert not leftover.exists()
