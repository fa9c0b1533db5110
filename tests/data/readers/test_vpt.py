import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data.checks import check_episode
from dreamer.data.readers.vpt import CURSOR, VPTReader, draw_cursor, read_rows, runs
from dreamer.ops.minecraft import VPT, VPT_KEYS, decode_camera, encode_camera

COLUMN = {name: i for i, name in enumerate(VPT_KEYS)}
CAMERA = 23


def read(path: Path, **options):
    return VPTReader(path.parent, **options).read(path)


def pressed(episode, t: int) -> list[str]:
    return [name for name, column in COLUMN.items() if episode.actions[t, column]]


def test_a_row_is_the_action_at_its_frame(tmp_path, write_vpt):
    rows = [{"keys": ["w"]}, {"dx": 4.0, "buttons": [1]}, {}, {"dy": -20, "keys": ["left.shift", "space"]}, {"buttons": [2]}]
    video = write_vpt(tmp_path / "deep" / "one.mp4", rows, step=40)
    reader = VPTReader(tmp_path, size=(16, 24))
    assert reader.find(tmp_path) == [video] and reader.find(video) == [video] == reader.find(video.with_suffix(".jsonl"))
    episode = reader.read(video)
    assert reader.action_space is VPT and reader.frames_per_second == 20
    assert [pressed(episode, t) for t in range(5)] == [["forward"], ["use"], [], ["jump", "sneak"], ["pickItem"]]
    assert episode.actions[:, CAMERA].tolist() == [60, 61, 60, 60 - 33, 60]  # 0.6 degrees to the right; 3 degrees up
    assert episode.frames.shape == (5, 3, 16, 24)
    assert np.abs(episode.frames.mean((1, 2, 3)) - 40 * np.arange(5)).max() < 6
    assert episode.action_mask.all() and not episode.has_rewards and not episode.terminals.any()
    assert episode.info == {"gui_rows": [], "dropped": {}}


KEYS = {"w": "forward", "s": "back", "a": "left", "d": "right", "space": "jump", "left.shift": "sneak", "left.control": "sprint"}
KEYS |= {"q": "drop", "e": "inventory", "f": "swapHands", "escape": "ESC"} | {str(i): f"hotbar.{i}" for i in range(1, 10)}


def test_every_key_has_its_column(tmp_path, write_vpt):
    rows = [*({"keys": [key]} for key in KEYS), *({"buttons": [i]} for i in range(3)), {"keys": ["f3", "left.alt"], "buttons": [5]}]
    write_vpt(tmp_path / "one.mp4", rows, 1)
    keys = read_rows(tmp_path / "one.jsonl", 99).keys
    expected = [*KEYS.values(), "attack", "use", "pickItem"]
    assert [VPT_KEYS[int(row.argmax())] for row in keys[:-1]] == expected and sorted(expected) == sorted(VPT_KEYS)
    assert keys.sum(1).tolist() == [1] * 23 + [0]


def test_small_turns_are_not_rounded_away(tmp_path, write_vpt):
    write_vpt(tmp_path / "one.mp4", [{"dx": 3.0, "dy": 1.5}, {"dx": -6.5}], 2)
    assert np.allclose(read_rows(tmp_path / "one.jsonl", 9).degrees, [[0.225, 0.45], [0, -0.975]])
    assert read(tmp_path / "one.mp4").actions[:, CAMERA].tolist() == [61, 59]


@pytest.mark.parametrize(
    ("new", "attack"),
    [
        ({0: [0], 3: [0]}, [0, 0, 0, 1, 1]),  # stuck until it is pressed
        ({0: [0], 2: [1], 3: [1, 0]}, [0, 0, 0, 1, 1]),
        ({0: [0]}, [0, 0, 0, 0, 0]),  # never pressed
        ({}, [1, 1, 1, 1, 1]),  # held from before the recording: row 0 says nothing of a press
        ({0: [1]}, [1, 1, 1, 1, 1]),
        ({0: [0, 1]}, [1, 1, 1, 1, 1]),
    ],
)
def test_an_attack_that_nobody_pressed_is_released(tmp_path, write_vpt, new, attack):
    video = write_vpt(tmp_path / "one.mp4", [{"buttons": [0, 1], "newButtons": new.get(t, [])} for t in range(5)])
    episode = read(video)
    assert episode.actions[:, COLUMN["attack"]].tolist() == attack
    assert episode.actions[:, COLUMN["use"]].all()  # other buttons stay
    assert episode.info.get("stuck_attack", 0) == 5 - sum(attack)


def test_the_wheel_becomes_a_key_in_the_tick_before_the_slot_changes(tmp_path, write_vpt):
    slots = [0, 0, 4, 4, 8, 8, 2, 2]
    more = [{}, {"dwheel": -1.0}, {}, {"keys": ["9"]}, {"keys": ["9"]}, {"buttons": [2]}, {}, {}]
    video = write_vpt(tmp_path / "one.mp4", [{"hotbar": slot, **row} for slot, row in zip(slots, more, strict=True)])
    episode = read(video)
    assert [pressed(episode, t) for t in range(8)] == [[], ["hotbar.5"], [], ["hotbar.9"], ["hotbar.9"], ["pickItem"], [], []]
    assert episode.info["hotbar_by_wheel"] == 1


@pytest.mark.parametrize(
    ("num_rows", "num_frames", "dropped"), [(6, 4, {"rows_without_frame": 2}), (4, 6, {"frames_without_row": 2}), (5, 5, {})]
)
def test_the_shorter_half_decides(tmp_path, write_vpt, num_rows, num_frames, dropped):
    video = write_vpt(tmp_path / "one.mp4", [{"dx": 20.0 * t} for t in range(num_rows)], num_frames, step=40)
    episode = read(video)
    num = min(num_rows, num_frames)
    assert len(episode) == num and episode.info["dropped"] == dropped
    assert np.array_equal(episode.actions[:, CAMERA], encode_camera(np.array([[0, 3.0 * t] for t in range(num)])))
    assert np.abs(episode.frames.mean((1, 2, 3)) - 40 * np.arange(num)).max() < 6


def test_leading_ticks_can_be_left_out(tmp_path, write_vpt):
    video = write_vpt(tmp_path / "one.mp4", [{"dx": 20.0 * t, "isGuiOpen": t > 3} for t in range(6)], step=40)
    episode = read(video, skip_first=2)
    assert np.array_equal(episode.actions[:, CAMERA], encode_camera(np.array([[0, 3.0 * t] for t in range(2, 6)])))
    assert abs(episode.frames[0].mean() - 80) < 6
    assert episode.info == {"gui_rows": [[2, 4]], "dropped": {"ticks": 2}}
    with pytest.raises(ValueError, match=r"one\.mp4: of 6 ticks none is left \(skip_first is 6"):
        read(video, skip_first=6)


def gui_rows(marks: str) -> list[dict]:
    return [{"isGuiOpen": mark == "g", "dx": 8.0, "keys": ["w"]} for mark in marks]


def test_ticks_with_a_gui_are_kept_and_listed(tmp_path, write_vpt):
    episode = read(write_vpt(tmp_path / "one.mp4", gui_rows("..gg.....g")))
    assert episode.info["gui_rows"] == [[2, 4], [9, 10]] and episode.action_mask.all() and len(episode) == 10


def test_ticks_with_a_gui_can_be_masked(tmp_path, write_vpt):
    episode = read(write_vpt(tmp_path / "one.mp4", gui_rows("..gg.....g")), gui="mask")
    assert episode.action_mask.tolist() == [mark != "g" for mark in "..gg.....g"]
    assert not episode.actions[~episode.action_mask].any() and episode.actions[episode.action_mask, 0].all()
    assert episode.info["gui_rows"] == [[2, 4], [9, 10]]


def test_only_the_longest_stretch_without_a_gui_can_be_kept(tmp_path, write_vpt):
    video = write_vpt(tmp_path / "one.mp4", gui_rows("..gg.....g"), step=20)
    episode = read(video, gui="cut")
    assert len(episode) == 5 and abs(episode.frames[0].mean() - 80) < 6
    assert episode.info == {"gui_rows": [], "dropped": {"ticks": 5}}
    assert len(read(video, gui="cut", skip_first=7)) == 2
    everywhere = write_vpt(tmp_path / "two.mp4", gui_rows("ggg"))
    with pytest.raises(ValueError, match=r"two\.mp4: of 3 ticks none is left .*gui is cut"):
        read(everywhere, gui="cut")


def test_runs():
    assert runs(np.array([True, False, True, True])) == [[0, 1], [2, 4]]
    assert runs(np.array([False, True]), 5) == [[6, 7]] and runs(np.zeros(0, bool)) == []


@pytest.mark.parametrize(
    ("folder", "version", "scale"),
    [
        ("clips", None, 1.0),
        ("6.9", None, 2.0),
        ("5.8", None, 0.5),
        ("10.0", None, 1.0),
        ("clips", "6.7", 2.0),
        ("clips", 5.7, 0.5),
        ("6.9", "10.0", 1.0),
    ],
)
def test_the_mouse_in_a_gui_is_scaled_by_the_version_of_the_recorder(tmp_path, write_vpt, folder, version, scale):
    video = write_vpt(tmp_path / folder / "one.mp4", [{"dx": 8.0}, {"dx": 8.0, "isGuiOpen": True}])
    turns = np.array([[0, 1.2], [0, 1.2 * scale]])
    assert read(video, recorder_version=version).actions[:, CAMERA].tolist() == encode_camera(turns).tolist()


def test_the_cursor_is_drawn_where_a_gui_is_open(tmp_path, write_vpt):
    rows = [{"x": 640.0, "y": 360.0, "isGuiOpen": t == 1} for t in range(3)]
    frames = read(write_vpt(tmp_path / "one.mp4", rows, size=(72, 128), step=0), size=(72, 128)).frames
    assert frames[0].max() < 30 and frames[2].max() < 30
    rows_lit, columns_lit = np.nonzero(frames[1].min(0) > 200)
    assert (rows_lit.min(), columns_lit.min()) == (36 + 2, 64 + 1)  # the tip is at (640, 360) / 10; its outline is black
    assert rows_lit.max() < 36 + CURSOR.shape[0] and columns_lit.max() < 64 + CURSOR.shape[1]


def test_a_cursor_at_the_edge_is_cut_off():
    grey = np.full((72, 128, 3), 100, np.uint8)
    inside = draw_cursor(grey, 0.0, 0.0)
    assert inside[0, 0].tolist() == [0, 0, 0] and inside[2, 1].tolist() == [255] * 3 and inside[0, 1].tolist() == [100] * 3
    assert (grey == 100).all()  # the frame that was given stays
    for x, y in ((1279.0, 719.0), (-40.0, 100.0), (100.0, -50.0), (1240.0, -30.0)):
        changed = (draw_cursor(grey, x, y) != 100).any(-1)
        assert 0 < changed.sum() < (CURSOR > 0).sum()
    for x, y in ((1280.0, 0.0), (0.0, 720.0), (-200.0, 0.0), (0.0, -200.0), (1e6, 1e6), (-1e6, -1e6)):
        assert (draw_cursor(grey, x, y) == 100).all()


def test_halves_without_the_other_are_left_out(tmp_path, write_vpt):
    video = write_vpt(tmp_path / "a.mp4", [{}])
    write_vpt(tmp_path / "b.mp4", [{}]).with_suffix(".jsonl").unlink()
    write_vpt(tmp_path / "c.mp4", [{}]).unlink()
    reader = VPTReader(tmp_path)
    assert reader.find(tmp_path) == [video]
    assert {path.name: reason for path, reason in reader.skipped.items()} == {
        "b.mp4": "no .jsonl beside it",
        "c.jsonl": "no .mp4 beside it",
    }
    for path in (tmp_path / "b.mp4", tmp_path / "c.jsonl"):
        with pytest.raises(ValueError, match="no recordings here; expected .mp4 files, each with a .jsonl"):
            reader.find(path)


BROKEN = {
    "[]": "list indices",
    "3": "not subscriptable",
    "{}": r"'mouse' is missing",
    '{"mouse": {}}': r"'keyboard' is missing",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items())
def test_lines_that_are_no_rows_are_named(tmp_path, write_vpt, line, message):
    video = write_vpt(tmp_path / "one.mp4", [{}, {}, {}])
    rows = video.with_suffix(".jsonl").read_text().splitlines()
    video.with_suffix(".jsonl").write_text("\n".join([*rows[:2], line]))
    with pytest.raises(ValueError, match=rf"one\.jsonl: line 3 is no row of a VPT recording.*({message})"):
        read(video)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dx": "4"}, "mouse.dx is 4"),
        ({"dy": None}, "mouse.dy is None"),
        ({"dy": True}, "mouse.dy is True"),
        ({"dx": 1e9}, "mouse.dx is 1000000000.0"),
        ({"dx": 10**400}, "mouse.dx is 1000"),
        ({"x": []}, "mouse.x is"),
        ({"buttons": 0}, "mouse.buttons is no list"),
        ({"buttons": [[0]]}, "unhashable"),
        ({"newButtons": "0"}, "mouse.newButtons is no list"),
        ({"keyboard": {"keys": "key.keyboard.w"}}, "keyboard.keys is no list"),
        ({"keyboard": {"keys": [{}]}}, "unhashable"),
        ({"isGuiOpen": 1}, "isGuiOpen is not true or false"),
        ({"hotbar": 9}, "hotbar not 0 to 8"),
        ({"hotbar": 1.0}, "hotbar not 0 to 8"),
        ({"mouse": None}, "NoneType"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, write_vpt, changes, message):
    video = write_vpt(tmp_path / "one.mp4", [{}, changes])
    with pytest.raises(ValueError, match=rf"one\.jsonl: line 2 is no row of a VPT recording.*{message}"):
        read(video)


def test_files_that_are_cut_are_named(tmp_path, write_vpt):
    video = write_vpt(tmp_path / "one.mp4", [{} for _ in range(9)])
    jsonl = video.with_suffix(".jsonl")
    whole = jsonl.read_text()
    jsonl.write_text(whole[:-40])
    with pytest.raises(ValueError, match=r"one\.jsonl: line 9 cannot be read .*remove this line"):
        read(video)
    jsonl.write_text("")
    with pytest.raises(ValueError, match=r"one\.jsonl: holds no rows"):
        read(video)
    jsonl.write_text(whole)
    for name, options in (("jsonl: line 9 cannot", {"max_frames": 8}), ("mp4: more than 9 frames", {"max_frames": 9})):
        write_vpt(video, [{}] * 9, 10)
        with pytest.raises(ValueError, match=rf"one\.{name}"):
            read(video, **options)
    video.write_bytes(video.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"one\.mp4: cannot be decoded"):
        read(video)


def test_other_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gui is 'hide'; expected keep, mask or cut"):
        VPTReader(tmp_path, gui="hide")
    with pytest.raises(ValueError, match="skip_first is -1"):
        VPTReader(tmp_path, skip_first=-1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory, write_vpt) -> Path:
    rows = [{"buttons": [0], "newButtons": [0]}, {"dx": 4.5, "keys": ["w"]}, {"hotbar": 3, "isGuiOpen": True}, {}]
    return write_vpt(tmp_path_factory.mktemp("corrupt") / "one.mp4", rows, size=(16, 16))


def reads_or_names(recording: Path) -> None:
    try:
        check_episode(read(recording, max_frames=20), VPT, "here")
    except ValueError as error:
        assert str(recording.with_suffix("")) in str(error)


@given(data=st.data())
def test_any_bytes_give_an_episode_or_an_error_that_names_the_file(recording, with_damage, data):
    with_damage(recording.with_suffix(".jsonl"), data, lambda: reads_or_names(recording))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["key.keyboard.w", 10**400, -1, 9]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["mouse", "keys", "dx", "buttons"]), inner, max_size=3),
    max_leaves=6,
)


@given(
    line=st.integers(0, 3), at=st.sampled_from(["", "mouse", "keyboard", "hotbar", "isGuiOpen", "mouse.*", "keyboard.keys"]), data=st.data()
)
def test_any_json_gives_an_episode_or_an_error_that_names_the_file(recording, line, at, data):
    file = recording.with_suffix(".jsonl")
    good = file.read_text()
    rows = [json.loads(row) for row in good.splitlines()]
    value = data.draw(JSON)
    top, _, inner = at.partition(".")
    if inner == "*":
        inner = data.draw(st.sampled_from(sorted(rows[line]["mouse"])))
    if inner:
        rows[line][top][inner] = value
    elif top:
        rows[line][top] = value
    else:
        rows[line] = value
    try:
        file.write_text("\n".join(json.dumps(row) for row in rows))
        reads_or_names(recording)
    finally:
        file.write_text(good)


BEAVER = "trimmed_shabby-viridian-beaver-b064d8e1dc68-20220417-011815"
ANGORA = "trimmed_lovely-persimmon-angora-a39257c803d3-20220422-051333"


@pytest.mark.parametrize(("name", "num", "gui", "first_attack"), [(ANGORA, 1056, 852, 138), (BEAVER, 445, 291, 56)])
def test_real_recordings(sample_data, name, num, gui, first_attack):
    video = sample_data / "vpt" / f"{name}.mp4"
    reader = VPTReader(video)
    episode = reader.read(video)
    check_episode(episode, VPT, name)
    assert len(episode) == num and not episode.has_rewards
    assert episode.info["gui_rows"] == [[gui, num]]
    # row 0 says that the attack was pressed, which nobody did: the first press comes later
    assert int(episode.actions[:, COLUMN["attack"]].argmax()) == first_attack
    rows = [json.loads(line) for line in video.with_suffix(".jsonl").read_text().splitlines()]
    turned = np.diff([[row["pitch"], row["yaw"]] for row in rows[: gui + 1]], axis=0)
    degrees = read_rows(video.with_suffix(".jsonl"), 9999).degrees[:gui]
    free = np.abs(np.array([row["pitch"] for row in rows[1 : gui + 1]])) < 89.9  # looking straight down, one cannot look further
    for axis, which in ((0, free), (1, slice(None))):
        assert np.corrcoef(turned[which, axis], degrees[which, axis])[0, 1] > 0.99
    assert np.abs(turned[:, 1] - degrees[:, 1]).max() < 0.01
    # what is left of it in the classes: exactly the class of the turn that the game made, whose middle is near it
    assert np.mean(episode.actions[:gui, CAMERA] % 11 == encode_camera(turned) % 11) > 0.99
    decoded = decode_camera(episode.actions[:gui, CAMERA].astype(int))
    assert np.corrcoef(np.clip(turned[:, 1], -10, 10), decoded[:, 1])[0, 1] > 0.98
    # the GUI is seen from the frame on whose row says so, and nothing else changes the picture that much; frame 0 is a stale screen
    changes = np.abs(np.diff(episode.frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    assert changes[2:].argmax() + 3 == gui and changes[0] == changes.max()
    cut = VPTReader(video, gui="cut").read(video)
    assert len(cut) == gui and cut.info["gui_rows"] == [] and np.array_equal(cut.actions, episode.actions[:gui])


def test_real_hotbar_by_wheel(sample_data):
    """The slot changes with rows 729 and 748, and the wheel turned one row before."""
    video = sample_data / "vpt" / f"{ANGORA}.mp4"
    keys = read_rows(video.with_suffix(".jsonl"), 9999).keys
    slots = keys[:, COLUMN["hotbar.1"] : COLUMN["hotbar.9"] + 1]
    assert np.argwhere(slots).tolist() == [[728, 1], [747, 0]]
