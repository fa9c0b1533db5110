import numpy as np
import pytest

from dreamer.data import EpisodeStore, import_recordings, make_reader
from dreamer.data.files import locked
from dreamer.ops.minecraft import MINERL


def write(folder, length=6, num_rewards=None):
    folder.mkdir(parents=True)
    np.save(folder / "frames.npy", np.full((length, 4, 4, 3), length, np.uint8))
    np.save(folder / "rewards.npy", np.ones(length if num_rewards is None else num_rewards, np.float32))
    np.savez(folder / "actions.npz", keyboard=np.ones((length, 8)), camera=np.full(length, 60))


def test_import_then_import_more(tmp_path):
    for name, length in [("a", 5), ("b/deep", 7)]:
        write(tmp_path / "in" / name, length)
    calls = []
    report = import_recordings(tmp_path / "in", tmp_path / "out", "npy", progress=lambda *c: calls.append(c))
    assert (report.num_episodes, report.num_frames, report.num_known) == (2, 12, 0)
    assert calls == [(1, 2), (2, 2)]
    write(tmp_path / "in" / "c", 4)
    report = import_recordings(tmp_path / "in", tmp_path / "out", "npy")
    assert (report.num_episodes, report.num_frames, report.num_known) == (1, 4, 2)
    store = EpisodeStore(tmp_path / "out")
    assert [i["source"] for i in store.infos] == ["a", "b/deep", "c"]
    assert store.lengths.tolist() == [5, 7, 4]
    assert (store.fps, store.extra) == (20.0, {"reader": "npy"})
    assert np.unique(store.frames(1)).tolist() == [7]


def test_two_cannot_import_into_one_store(tmp_path):
    write(tmp_path / "recordings" / "a")
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="out: another process is at work here"):
        import_recordings(tmp_path / "recordings", tmp_path / "out", "npy")
    assert import_recordings(tmp_path / "recordings", tmp_path / "out", "npy").num_episodes == 1


def test_a_broken_recording_is_named_and_the_others_kept(tmp_path):
    write(tmp_path / "in" / "a")
    write(tmp_path / "in" / "b", num_rewards=3)
    with pytest.raises(ValueError, match=r"in/b: got lengths that disagree: 6 frames, 6 actions, 3 rewards"):
        import_recordings(tmp_path / "in", tmp_path / "out", "npy")
    assert [i["source"] for i in EpisodeStore(tmp_path / "out").infos] == ["a"]


def test_max_episodes(tmp_path):
    for name in "abc":
        write(tmp_path / "in" / name)
    assert import_recordings(tmp_path / "in", tmp_path / "out", "npy", max_episodes=2).num_episodes == 2


def test_unknown_readers_and_paths_are_named(tmp_path):
    expected = r"no reader is called 'vidoe'; expected one of \['minari', 'minerl', 'npy', 'video', 'vpt'\]. Did you mean 'video'"
    with pytest.raises(ValueError, match=expected):
        make_reader("vidoe", tmp_path)
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        import_recordings(tmp_path / "nowhere", tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": [8, 8]}, "the reader 'vpt' has no option 'sise'; expected size, gui, skip_first.* Did you mean 'size'"),
        ({"path": "x"}, "the reader 'vpt' has no option 'path'"),
        ({"name": "x"}, "the reader 'vpt' has no option 'name'"),
        ({"progress": 1}, "the reader 'vpt' has no option 'progress'"),
        ({"gui": 3}, "the reader 'vpt': gui is 3: Input should be"),
        ({"gui": "hide"}, "gui is 'hide'; expected keep, mask or cut"),
        ({"size": "big"}, "size is 'big'"),
        ({"size": [8]}, r"size is \[8\]; expected \[height, width\]"),
        ({"max_frames": "many"}, "max_frames is 'many'"),
    ],
)
def test_options_that_a_reader_does_not_take_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        import_recordings(tmp_path, tmp_path / "out", "vpt", options=options)
    assert not (tmp_path / "out").exists()


def test_a_reader_needs_a_positive_rate(tmp_path):
    write(tmp_path / "in" / "a")
    with pytest.raises(ValueError, match="the reader 'npy': frames_per_second is 0"):
        make_reader("npy", tmp_path, frames_per_second=0)
    assert make_reader("npy", tmp_path, frames_per_second=5).frames_per_second == 5.0


def test_options_are_remembered_and_must_stay(tmp_path):
    write(tmp_path / "in" / "a")
    import_recordings(tmp_path / "in", tmp_path / "out", "npy", options={"action_space": MINERL})
    assert EpisodeStore(tmp_path / "out").extra == {"reader": "npy", "options": {"action_space": MINERL.to_json()}}
    write(tmp_path / "in" / "b")
    with pytest.raises(ValueError, match="extra is .*cannot append"):
        import_recordings(tmp_path / "in", tmp_path / "out", "npy")
    assert import_recordings(tmp_path / "in", tmp_path / "out", "npy", options={"action_space": MINERL}).num_episodes == 1
