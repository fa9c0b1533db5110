import json

import numpy as np
import pytest

from dreamer.data import EpisodeStore, import_recordings, make_reader
from dreamer.types import ActionComponent, ActionSpace


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
    with pytest.raises(ValueError, match=r"no reader is called 'vidoe'; expected one of \['npy', 'video'\]. Did you mean 'video'"):
        make_reader("vidoe", tmp_path)
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        import_recordings(tmp_path / "nowhere", tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("video", {"siz": 64}, "'video' has no option 'siz'; expected one of size, action_space, frames_per_second, max_frames"),
        ("npy", {"path": "x"}, "'npy' has no option 'path'; expected one of action_space, frames_per_second"),
        ("video", {"size": 64}, "reader 'video': size: Input should be a valid tuple; got 64"),
        ("video", {"size": [64, 0]}, "size.1: Input should be greater than 0; got 0"),
        ("video", {"max_frames": "many"}, "max_frames: .* integer.*; got 'many'"),
        ("npy", {"frames_per_second": 0}, "frames_per_second: Input should be greater than 0; got 0"),
        ("npy", {"action_space": 3}, "reader 'npy': action_space: .*; got 3"),
        ("npy", {"action_space": []}, "action_space: an action space needs at least one component"),
        ("video", {"action_space": [{"name": "a", "kind": "key", "size": 2}]}, "components.0.kind: .*'binary'.*; got 'key'"),
        ("video", {"action_space": [{"name": "a", "kind": "binary", "sise": 2}]}, "components.0.size: Field required"),
        ("video", {"action_space": [{"name": "a", "kind": "binary", "size": 2, "lo": 0}]}, "components.0.lo: Unexpected .*; got 0"),
        ("video", {"action_space": [{"name": "a", "kind": "binary", "size": 0}]}, "size is 0; expected at least 1"),
    ],
)
def test_options_that_a_reader_cannot_use_are_one_line(tmp_path, name, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        make_reader(name, tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["npy", "video"])
def test_an_action_space_can_be_given_as_a_config_holds_it(tmp_path, name):
    space = ActionSpace((ActionComponent("keys", "binary", 2, labels=("a", "b")), ActionComponent("aim", "continuous", 1, -2.0, 2.0)))
    reader = make_reader(name, tmp_path, action_space=json.loads(json.dumps(space.to_json())), frames_per_second=10)
    assert reader.action_space == space
    assert make_reader(name, tmp_path, action_space=space, frames_per_second=10).action_space is space
