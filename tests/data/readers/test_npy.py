import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data.checks import check_episode
from dreamer.data.readers.npy import NpyReader
from dreamer.ops.minecraft import CAMERA_STILL, MINERL, MINERL_ITEMS, MINERL_KEYS, encode_camera
from dreamer.types import ActionComponent, ActionSpace


def write(folder: Path, length: int = 6, seed: int = 0, *, missing: int = 0, **changes) -> Path:
    """A recording of the seed's layout: ``length`` frames, ``length - missing`` actions and rewards."""
    rng = np.random.default_rng(seed)
    num = length - missing
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "frames": rng.integers(0, 256, (length, 4, 5, 3), dtype=np.uint8),
        "rewards": np.arange(1, num + 1, dtype=np.float32),
        "keyboard": rng.integers(0, 2, (num, 8)),
        "camera": rng.integers(0, 121, num),
    } | changes
    np.save(folder / "frames.npy", arrays["frames"])
    np.save(folder / "rewards.npy", arrays["rewards"])
    np.savez(folder / "actions.npz", **{"action$keyboard": arrays["keyboard"], "action$camera": arrays["camera"]})
    return folder


def test_one_action_for_every_frame(tmp_path):
    folder = write(tmp_path / "env" / "one")
    reader = NpyReader(tmp_path)
    assert reader.find(tmp_path) == [folder]
    assert reader.action_space == MINERL
    episode = reader.read(folder)
    with np.load(folder / "actions.npz") as actions:
        assert np.array_equal(episode.actions[:, :8], actions["action$keyboard"])
        assert np.array_equal(episode.actions[:, 8], actions["action$camera"])
    assert np.array_equal(episode.frames, np.load(folder / "frames.npy").transpose(0, 3, 1, 2))
    assert episode.action_mask.all()
    assert episode.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert episode.info["reward_after_end"] == 6


def test_one_action_fewer_than_frames(tmp_path):
    folder = write(tmp_path / "one", missing=1)
    episode = NpyReader(tmp_path).read(folder)
    assert episode.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert episode.action_mask.tolist() == [True] * 5 + [False]


def test_actions_npy(tmp_path):
    folder = write(tmp_path / "one")
    (folder / "actions.npz").unlink()
    rows = np.concatenate([np.ones((6, 8)), np.full((6, 1), 60)], 1)
    np.save(folder / "actions.npy", rows)
    assert np.array_equal(NpyReader(tmp_path).read(folder).actions, rows)
    np.save(folder / "actions.npy", rows[:, :3])
    with pytest.raises(ValueError, match=r"actions\.npy: got actions of shape \(6, 3\)"):
        NpyReader(tmp_path)
    space = ActionSpace((ActionComponent("x", "binary", 3),))
    assert NpyReader(tmp_path, action_space=space).read(folder).actions.shape == (6, 3)


def test_minerl_keys(tmp_path):
    folder = write(tmp_path / "one")
    camera = np.random.default_rng(0).uniform(-20, 20, (6, 2)).astype(np.float32)
    np.savez(folder / "actions.npz", **{"action$attack": np.ones(6, int), "action$camera": camera, "action$jump": np.zeros(6, int)})
    reader = NpyReader(tmp_path)
    assert [(c.name, c.kind, c.size) for c in reader.action_space.components] == [
        ("attack", "binary", 1),
        ("camera", "continuous", 2),
        ("jump", "binary", 1),
    ]
    assert np.array_equal(reader.read(folder).actions[:, 1:3], camera)


def write_minerl_keys(folder: Path, length: int = 6, missing: int = 1, **more) -> tuple[Path, dict[str, np.ndarray]]:
    """As the recordings of MineRL look once extracted: its own keys, the camera in degrees, observations beside them."""
    rng = np.random.default_rng(1)
    actions: dict[str, np.ndarray] = {key: rng.integers(0, 2, length - missing) for key in MINERL_KEYS}
    actions |= {"camera": rng.uniform(-20, 20, (length - missing, 2)).astype(np.float32)} | more
    write(folder, length, missing=missing)
    np.savez(folder / "actions.npz", **{f"action${name}": array for name, array in actions.items()})
    np.savez(folder / "observations.npz", **{"observation$inventory$dirt": np.zeros(length)})
    (folder / "metadata.json").write_text('{"success": "True"}')
    return folder, actions


@pytest.mark.parametrize("missing", [0, 1])
def test_extracted_minerl_becomes_its_action_space(tmp_path, missing):
    folder, actions = write_minerl_keys(tmp_path / "MineRLTreechop-v0" / "v3_one", missing=missing)
    reader = NpyReader(tmp_path)
    assert reader.action_space is MINERL
    episode = reader.read(folder)
    known = 6 - missing
    assert np.array_equal(episode.actions[:known, :8], np.stack([actions[key] for key in MINERL_KEYS], 1))
    assert np.array_equal(episode.actions[:known, 8], encode_camera(actions["camera"]))
    assert len(np.unique(episode.actions[:known, 8])) > 1 and episode.action_mask.sum() == known


def test_items_of_extracted_minerl_are_dropped_or_kept(tmp_path):
    place = np.array(["none", "dirt", "none", "dirt", "torch"])
    folder, _ = write_minerl_keys(tmp_path / "MineRLNavigate-v0" / "v3_one", place=place)
    episode = NpyReader(tmp_path).read(folder)
    assert episode.info["dropped_actions"] == {"place": 3} and episode.actions.shape == (6, 9)
    kept = NpyReader(tmp_path, action_space="minerl_items").read(folder)
    assert "dropped_actions" not in kept.info and kept.actions.shape == (6, 14)
    columns = dict(zip([c.name for c in MINERL_ITEMS.components], kept.actions[:5, [0, 8, 9, 10, 11, 12, 13]].T, strict=True))
    assert columns["place"].tolist() == [0, 1, 0, 1, 6] and not columns["craft"].any()


def test_an_action_space_may_come_from_a_config(tmp_path):
    folder = write(tmp_path / "one")
    (folder / "actions.npz").unlink()
    np.save(folder / "actions.npy", np.array([0, 1, 2, 1, 0, 2]))
    with pytest.raises(ValueError, match=r"actions\.npy: got actions of shape \(6,\); expected an action space that is known; give"):
        NpyReader(tmp_path)
    reader = NpyReader(tmp_path, action_space=[{"name": "move", "kind": "categorical", "size": 3}])
    assert reader.read(folder).actions[:, 0].tolist() == [0, 1, 2, 1, 0, 2]
    with pytest.raises(ValueError, match="no action space is called 'minecraft'; expected one of"):
        NpyReader(tmp_path, action_space="minecraft")
    for wrong in ([{"name": "move"}], ["move"], [{"name": "move", "kind": "categorical", "size": 3, "colour": 1}]):
        with pytest.raises(ValueError, match="(?s)action_space is .*; expected a list such as"):
            NpyReader(tmp_path, action_space=wrong)


def test_words_among_numbers_are_refused(tmp_path):
    folder = write(tmp_path / "one")
    np.savez(folder / "actions.npz", place=np.array(["none"] * 6), camera=np.zeros(6))
    space = ActionSpace((ActionComponent("place", "binary", 1), ActionComponent("camera", "categorical", 121)))
    with pytest.raises(ValueError, match=r"actions\.npz: got place of <U4; expected numbers"):
        NpyReader(tmp_path, action_space=space).read(folder)


def test_the_camera_at_rest_is_class_60(tmp_path):
    folder, _ = write_minerl_keys(tmp_path / "one", camera=np.zeros((5, 2)))
    assert NpyReader(tmp_path).read(folder).actions[:5, 8].tolist() == [CAMERA_STILL] * 5 == [60] * 5


def test_metadata_is_kept(tmp_path):
    folder = write(tmp_path / "one")
    (folder / "metadata.json").write_text(json.dumps({"success": True}))
    assert NpyReader(tmp_path).read(folder).info["metadata"] == {"success": True}
    for text in ("{", '{"x": NaN}'):
        (folder / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=r"metadata\.json: cannot be read"):
            NpyReader(tmp_path).read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": np.zeros(4)}, "one: got lengths that disagree: 6 frames, 6 actions, 4 rewards"),
        ({"frames": np.zeros((9, 4, 5, 3), np.uint8)}, "one: got lengths that disagree: 9 frames, 6 actions, 6 rewards"),
        ({"camera": np.zeros(3, int)}, r"actions\.npz: got camera of shape \(3, 1\)"),
        ({"camera": np.full(6, 121)}, r"one: action 'camera' has values in \[121, 121\]; expected \[0, 120\]"),
        ({"keyboard": np.full((6, 8), 0.5)}, "one: action 'keyboard' holds values that are not whole numbers"),
        ({"keyboard": np.full((6, 8), np.nan)}, "one: action 'keyboard' holds NaN"),
        ({"rewards": np.array([0, 1, np.nan, 0, 0, 0])}, r"rewards\.npy: got NaN"),
        ({"rewards": np.array(list("abcdef"))}, r"rewards\.npy: got <U1"),
        ({"frames": np.zeros((6, 4, 5, 3), np.float32)}, r"frames\.npy: got float32"),
        ({"frames": np.zeros((6, 4, 5), np.uint8)}, r"frames\.npy: got uint8 \(6, 4, 5\)"),
        ({"frames": np.zeros((0, 4, 5, 3), np.uint8)}, r"frames\.npy: got"),
        ({"rewards": np.array([None] * 6)}, r"rewards\.npy: cannot be read"),
    ],
)
def test_broken_recordings_are_named(tmp_path, changes, message):
    folder = write(tmp_path / "one", **changes)
    with pytest.raises(ValueError, match=message):
        NpyReader(tmp_path, action_space=MINERL).read(folder)


@pytest.mark.parametrize("name", ["rewards.npy", "actions.npz"])
def test_missing_files_are_named(tmp_path, name):
    folder = write(tmp_path / "one")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name.replace("npz", "npy")):
        NpyReader(tmp_path, action_space=MINERL).read(folder)


def test_other_actions_than_the_first_recording_are_refused(tmp_path):
    write(tmp_path / "a")
    folder = write(tmp_path / "b")
    np.savez(folder / "actions.npz", **{"action$attack": np.zeros(6)})
    reader = NpyReader(tmp_path)
    with pytest.raises(ValueError, match=r"actions\.npz: got the actions \['attack'\]; expected \['camera', 'keyboard'\]"):
        reader.read(folder)


def test_a_folder_without_recordings_is_named(tmp_path):
    with pytest.raises(ValueError, match="no recordings here"):
        NpyReader(tmp_path)


@given(length=st.integers(1, 20), missing=st.integers(0, 1), seed=st.integers(0, 10**6))
def test_any_sound_recording_is_read(tmp_path_factory, length, missing, seed):
    folder = write(tmp_path_factory.mktemp("sound") / "one", length, seed, missing=missing)
    episode = NpyReader(folder.parent).read(folder)
    check_episode(episode, MINERL, "here")
    assert len(episode) == length
    known = length - missing
    with np.load(folder / "actions.npz") as actions:
        assert np.array_equal(episode.actions[:known, 8], actions["action$camera"])
    assert episode.rewards[1:].tolist() == list(range(1, length))


@given(num_frames=st.integers(0, 6), num_keyboard=st.integers(0, 6), num_camera=st.integers(0, 6), num_rewards=st.integers(0, 6))
def test_only_lengths_that_agree_are_read(tmp_path_factory, num_frames, num_keyboard, num_camera, num_rewards):
    folder = write(
        tmp_path_factory.mktemp("lengths") / "one",
        frames=np.zeros((num_frames, 2, 2, 3), np.uint8),
        keyboard=np.zeros((num_keyboard, 8)),
        camera=np.zeros(num_camera),
        rewards=np.zeros(num_rewards),
    )
    agree = num_frames > 0 and num_keyboard == num_camera == num_rewards and num_frames - num_rewards in (0, 1)
    if agree:
        assert len(NpyReader(folder.parent).read(folder)) == num_frames
    else:
        with pytest.raises(ValueError, match=str(folder)):
            NpyReader(folder.parent).read(folder)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("bytes") / "one", 3)


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_any_bytes_give_an_episode_or_an_error_that_names_the_recording(recording, with_damage, data):
    def reads_or_names() -> None:
        try:
            check_episode(NpyReader(recording.parent, action_space=MINERL).read(recording), MINERL, "here")
        except ValueError as error:
            assert str(recording) in str(error)

    with_damage(recording / data.draw(st.sampled_from(["frames.npy", "rewards.npy", "actions.npz"])), data, reads_or_names)
