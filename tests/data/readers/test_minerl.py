import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data import EpisodeStore, import_recordings
from dreamer.data.checks import check_episode
from dreamer.data.readers.minerl import MineRLReader
from dreamer.ops.minecraft import MINERL, MINERL_ITEMS, MINERL_KEYS, encode_camera

TREECHOP = "MineRLTreechop-v0"


@pytest.mark.parametrize("leading", [0, 3, 26])
def test_the_last_frames_are_the_episode(tmp_path, write_minerl, leading):
    folder = write_minerl(tmp_path / TREECHOP / "v4_one", 4, leading)
    reader = MineRLReader(tmp_path, size=(16, 24))
    assert reader.find(tmp_path) == [folder] == reader.find(folder)
    assert reader.action_space is MINERL and reader.frames_per_second == 20
    episode = reader.read(folder)
    assert episode.frames.shape == (5, 3, 16, 24)
    assert np.abs(episode.frames.mean((1, 2, 3)) - 8 * np.arange(leading, leading + 5)).max() < 6
    assert episode.info == {"environment": TREECHOP, "stream": "v4_one", "success": True, "leading_frames_skipped": leading}


def test_actions_and_rewards_lead_to_the_next_frame(tmp_path, write_minerl):
    folder = write_minerl(tmp_path / TREECHOP / "v4_one", 6)
    episode = MineRLReader(tmp_path).read(folder)
    with np.load(folder / "rendered.npz", allow_pickle=False) as rendered:
        assert np.array_equal(episode.actions[:6, :8], np.stack([rendered[f"action${key}"] for key in MINERL_KEYS], 1))
        assert np.array_equal(episode.actions[:6, 8], encode_camera(rendered["action$camera"]))
    assert episode.action_mask.tolist() == [True] * 6 + [False]
    assert episode.rewards.tolist() == [0, 1, 2, 3, 4, 5, 6] and episode.has_rewards


@pytest.mark.parametrize(("success", "ended"), [(True, True), (False, False), ("True", True), ("False", False), (None, False)])
def test_a_success_ends_the_episode(tmp_path, write_minerl, success, ended):
    folder = write_minerl(tmp_path / TREECHOP / "v3_one", metadata={"success": success})
    episode = MineRLReader(tmp_path).read(folder)
    assert episode.terminals.tolist() == [False] * 6 + [ended] and episode.info["success"] is ended


def test_frames_behind_the_counted_ones_are_dropped(tmp_path, write_minerl):
    """MineRL counted by decoding; a video that decodes to more is cut where MineRL's count ends."""
    folder = write_minerl(tmp_path / TREECHOP / "v4_one", 4, 3, {"true_video_frame_count": 7})
    episode = MineRLReader(tmp_path).read(folder)
    assert np.abs(episode.frames.mean((1, 2, 3)) - 8 * np.arange(2, 7)).max() < 6
    assert episode.info["leading_frames_skipped"] == 2
    folder = write_minerl(tmp_path / TREECHOP / "v4_two", 4, 3, {"true_video_frame_count": None, "duration_steps": None})
    assert MineRLReader(tmp_path).read(folder).info["leading_frames_skipped"] == 3


PLACE = np.array(["none", "dirt", "none", "dirt", "dirt", "none"])


def test_items_are_dropped_and_counted_or_kept(tmp_path, write_minerl):
    craft = np.array(["planks", "none", "none", "none", "none", "none"])
    folder = write_minerl(tmp_path / "MineRLObtainDiamond-v0" / "v4_one", action_place=PLACE, action_craft=craft)
    episode = MineRLReader(tmp_path).read(folder)
    assert episode.info["dropped_actions"] == {"place": 3, "craft": 1} and episode.actions.shape == (7, 9)
    reader = MineRLReader(tmp_path, item_actions=True)
    kept = reader.read(folder)
    assert reader.action_space is MINERL_ITEMS and "dropped_actions" not in kept.info
    assert kept.actions[:6, 9].tolist() == [0, 1, 0, 1, 1, 0] and kept.actions[:6, 11].tolist() == [3, 0, 0, 0, 0, 0]
    without = write_minerl(tmp_path / TREECHOP / "v4_one")
    assert not reader.read(without).actions[:, 9:].any()  # nothing can be placed there: none


def test_obfuscated_streams_are_refused(tmp_path, write_minerl):
    keys = {f"action_{key}": None for key in (*MINERL_KEYS, "camera")}
    hidden = write_minerl(tmp_path / "renamed" / "v4_one", **keys, action_vector=np.zeros((6, 64)))
    with pytest.raises(ValueError, match=r"rendered\.npz: its actions are obfuscated vectors .*without VectorObf"):
        MineRLReader(tmp_path).read(hidden)
    plain = write_minerl(tmp_path / TREECHOP / "v4_one")
    named = write_minerl(tmp_path / "MineRLTreechopVectorObf-v0" / "v4_one", **keys, action_vector=np.zeros((6, 64)))
    reader = MineRLReader(tmp_path)
    assert reader.find(tmp_path) == [plain, hidden] and "obfuscated" in reader.skipped[named]
    with pytest.raises(ValueError, match="no recordings here that can be used .*obfuscated"):
        reader.find(named.parent)


def test_the_stream_that_is_known_to_be_bad_is_left_out(tmp_path, write_minerl):
    bad = write_minerl(tmp_path / TREECHOP / "v3_tempting_capers_shapeshifter-14")
    good = write_minerl(tmp_path / TREECHOP / "v3_tempting_capers_shapeshifter-1")
    reader = MineRLReader(tmp_path)
    assert reader.find(tmp_path) == [good] and "known to be corrupt" in reader.skipped[bad]
    with pytest.raises(ValueError, match="shapeshifter-14: known to be corrupt"):
        reader.read(bad)
    report = import_recordings(tmp_path, tmp_path / "store", "minerl")
    assert report.num_episodes == 1 and len(report.skipped) == 1 and "known to be corrupt" in report.skipped[0]
    assert EpisodeStore(tmp_path / "store").infos[0]["source"] == f"{TREECHOP}/{good.name}"


@pytest.mark.parametrize(
    ("metadata", "arrays", "message"),
    [
        ({"duration_steps": 7}, {}, r"rendered\.npz: got 6 rewards; expected duration_steps = 7"),
        ({"duration_steps": "6"}, {}, r"metadata\.json: got duration_steps = '6'; expected a whole number"),
        ({"true_video_frame_count": 11}, {}, r"recording\.mp4: got 10 frames; expected true_video_frame_count = 11"),
        (
            {"true_video_frame_count": 6},
            {},
            r"recording\.mp4: got 10 frames; expected true_video_frame_count = 6.* at least the episode's 7",
        ),
        ({"true_video_frame_count": -1}, {}, r"metadata\.json: got true_video_frame_count = -1"),
        ({"success": "yes"}, {}, r"metadata\.json: got success = 'yes'; expected true or false"),
        ({"success": [True]}, {}, r"metadata\.json: got success = \[True\]"),
        (
            {},
            {"observation_inventory_dirt": np.zeros(6)},
            r"rendered\.npz: got observation\$inventory\$dirt of shape \(6,\); expected .* 7",
        ),
        ({}, {"action_attack": np.zeros(5)}, r"rendered\.npz: got attack of float64 \(5,\)"),
        ({}, {"action_attack": None}, r"rendered\.npz: got the actions .*; expected .*attack"),
        ({}, {"action_attack": np.full(6, 2)}, r"rendered\.npz: action 'keyboard' has values in \[0, 2\]"),
        ({}, {"action_camera": np.full((6, 2), np.nan)}, r"rendered\.npz: the camera holds NaN"),
        ({}, {"reward": None}, r"rendered\.npz: got the arrays .*; expected reward"),
        ({}, {"reward": np.full(6, np.inf)}, r"rendered\.npz: got reward float64"),
        ({}, {"reward": np.zeros(0)}, r"rendered\.npz: got reward float64 \(0,\)"),
        ({"duration_steps": 5}, {"reward": np.zeros(5), "observation_inventory_dirt": np.zeros(6)}, r"rendered\.npz: got 6 actions"),
    ],
)
def test_what_does_not_fit_together_is_named(tmp_path, write_minerl, metadata, arrays, message):
    folder = write_minerl(tmp_path / TREECHOP / "v4_one", metadata=metadata, **arrays)
    with pytest.raises(ValueError, match=message):
        MineRLReader(tmp_path).read(folder)


@pytest.mark.parametrize("name", ["recording.mp4", "metadata.json"])
def test_missing_and_cut_files_are_named(tmp_path, write_minerl, name):
    folder = write_minerl(tmp_path / TREECHOP / "v4_one")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name}: cannot be"):
        MineRLReader(tmp_path).read(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: cannot be"):
        MineRLReader(tmp_path).read(folder)


def test_metadata_that_is_no_object_is_named(tmp_path, write_minerl):
    folder = write_minerl(tmp_path / TREECHOP / "v4_one")
    (folder / "metadata.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"metadata\.json: got list; expected an object"):
        MineRLReader(tmp_path).read(folder)


def test_a_folder_without_recordings_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no recordings here; expected folders that hold recording\.mp4, rendered\.npz and metadata\.json"
    ):
        MineRLReader(tmp_path).find(tmp_path)


@pytest.fixture(scope="module")
def recording(tmp_path_factory, write_minerl) -> Path:
    return write_minerl(tmp_path_factory.mktemp("corrupt") / TREECHOP / "v4_one", 3, 1, size=(16, 16))


def reads_or_names(recording: Path) -> None:
    try:
        check_episode(MineRLReader(recording).read(recording), MINERL, "here")
    except ValueError as error:
        assert str(recording) in str(error)


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_any_bytes_give_an_episode_or_an_error_that_names_the_recording(recording, with_damage, data):
    file = recording / data.draw(st.sampled_from(["rendered.npz", "metadata.json", "recording.mp4"]))
    with_damage(file, data, lambda: reads_or_names(recording))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2)
)


@given(name=st.sampled_from(["success", "duration_steps", "true_video_frame_count", "total_reward", "new"]), value=VALUES)
def test_any_metadata_gives_an_episode_or_an_error_that_names_the_file(recording, name, value):
    file = recording / "metadata.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(good) | {name: value}))
        reads_or_names(recording)
    finally:
        file.write_text(good)


ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["f4", "f8", "i1", "i8", "?", "U3", "S2", "c8", "M8[s]", "V4"]),
    st.sampled_from([0, 1, 2, 127]),
)


@pytest.mark.filterwarnings("ignore")
@given(
    name=st.sampled_from(["action$attack", "action$camera", "action$place", "action$x", "reward", "observation$x", "more"]), array=ARRAYS
)
def test_any_array_gives_an_episode_or_an_error_that_names_the_file(recording, name, array):
    file = recording / "rendered.npz"
    good = file.read_bytes()
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        np.savez(file, **(arrays | {name: array}))
        reads_or_names(recording)
    finally:
        file.write_bytes(good)
