"""What ``dreamer inspect`` says of recordings and stores, sound and broken."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamer import cli
from dreamer.data import EpisodeStore, EpisodeWriter, LatentWriter, episode_from_transitions, guess_reader, import_recordings
from dreamer.pipeline.inspect import inspect_path
from dreamer.types import ActionComponent, ActionSpace

SPACE = ActionSpace((ActionComponent("move", "categorical", 3, labels=("left", "stay", "right")), ActionComponent("fire", "binary", 1)))


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    """Six episodes of 10 to 15 frames; always right, never left, always fire; the last one stands still."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "store", SPACE, frames_per_second=10.0, shard_episodes=2, extra={"by": "hand"}) as writer:
        for i in range(6):
            frames = rng.integers(0, 256, (10 + i, 3, 8, 8), dtype=np.uint8) if i < 5 else np.full((15, 3, 8, 8), 9, np.uint8)
            actions = np.tile([2.0, 1.0], (9 + i, 1))
            writer.add(episode_from_transitions(frames, actions, np.full(9 + i, 0.5), i == 0, info={"source": f"s{i}", "seed": i}))
    return EpisodeStore(tmp_path / "store")


def test_an_episode_store(store: EpisodeStore) -> None:
    found = inspect_path(store.path)
    assert found.kind == "episode store" and found.tally.lengths == [10, 11, 12, 13, 14, 15]
    text = found.text()
    for line in (
        "episodes   6",
        "frames     3 x 8 x 8 (C x H x W), 10 a second, 0:00:08 in all",
        'made by    {"by": "hand"}',
        "lengths    10 to 15, median 12 frames, 75 in all",
        "returns    4.5 to 7, median 5.75; 69 frames with a reward; 1 episodes ended by themselves",
        "actions    92.0 % known",
        "  move     right 100.0 %",
        "           never: left, stay",
        "  fire     0 100.0 %",
        "problems   5: s5: 14 of 15 frames are like the one before",
    ):
        assert " ".join(line.split()) in [" ".join(shown.split()) for shown in text.splitlines()], text
    assert found.sheet is not None and found.sheet.shape == (4 * (192 + 30) + 6, 8 * (192 + 6) + 6, 3)
    assert found.to_json()["actions"][0]["shares"] == {"left": 0, "stay": 0, "right": 1}
    json.dumps(found.to_json(), allow_nan=False)


def test_some_episodes_stand_for_all(store: EpisodeStore) -> None:
    calls = []
    found = inspect_path(store.path, max_episodes=3, progress=lambda *call: calls.append(call))
    assert found.tally.lengths == [10, 12, 15] and calls == [(1, 3), (2, 3), (3, 3)]
    assert dict(found.facts)["episodes"] == "3 of 6 episodes, spread evenly over them"
    with pytest.raises(ValueError, match="max_episodes is 0"):
        inspect_path(store.path, max_episodes=0)


def test_damage_is_a_problem_and_not_the_end(store: EpisodeStore) -> None:
    shard = store.shards[1].path
    data = bytearray(shard.read_bytes())
    place = bytes(data).index(np.float32(0.5).tobytes() * 3)  # rewards
    data[place] ^= 1
    shard.write_bytes(bytes(data))
    found = inspect_path(store.path)
    assert len(found.tally.lengths) == 5
    assert any("shard-000001" in problem and "checksum" in problem for problem in found.problems)


def test_noise_of_a_video_does_not_move_a_picture(tmp_path: Path) -> None:
    frames = np.full((12, 3, 8, 8), 100, np.uint8)
    frames[1::2, 0, 0, 0] += 4  # encoding noise
    for name, moving in (("still", 0), ("moving", 1)):
        frames[1::2, 0, 4, 4] += np.uint8(5 * moving)
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "frames.npy", frames.transpose(0, 2, 3, 1))
        np.savez(tmp_path / name / "actions.npz", keyboard=np.zeros((11, 8), np.int64), camera=np.zeros(11, np.int64))
        np.save(tmp_path / name / "rewards.npy", np.zeros(11))
    found = {name: inspect_path(tmp_path / name) for name in ("still", "moving")}
    assert found["still"].problems and "11 frames show the same as the one before" in found["still"].notes
    assert not found["moving"].problems and not found["moving"].notes


def test_a_latent_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    form = {"token_grid": (2, 1), "latent_channels": 3, "temporal_stride": 2}
    with LatentWriter(tmp_path / "l", action_space=SPACE, tokenizer_fingerprint="abc", source_fingerprint="s", **form) as writer:
        for length in (4, 6):
            latents = rng.normal(size=(length, 2, 3)).astype(np.float32) * np.array([1, 2, 0], np.float32)
            actions = np.tile(np.array([1, 0], np.float32), (length, 2, 1))
            mask = np.arange(2 * length).reshape(length, 2) < 2 * length - 1
            writer.add(latents, actions * mask[..., None], mask, np.zeros(length, np.float32), np.zeros(length, bool))
    found = inspect_path(tmp_path / "l")
    assert found.kind == "latent store" and found.sheet is None and found.unit == "latent steps"
    text = found.text()
    assert "2 x 1 tokens of 3, float32, 2 frames a step" in text and "abc" in text and "stay 100.0 %" in text
    assert "1 of 3 channels hardly vary (deviation below 0.05): [2]" in text
    assert found.tally.num_known == 18 and found.tally.num_actions == 20


def test_recordings_are_recognised(tmp_path: Path, write_vpt: Callable, write_minerl: Callable, write_video: Callable) -> None:
    video = write_vpt(tmp_path / "v" / "one.mp4", [{}] * 3)
    stream = write_minerl(tmp_path / "m" / "MineRLTreechop-v0" / "v4_one")
    write_video(tmp_path / "p" / "one.mp4", 3)
    (tmp_path / "p" / "metrics.jsonl").write_text("{}\n")  # beside no video of its name
    assert [guess_reader(path) for path in (tmp_path / "v", video, video.with_suffix(".jsonl"))] == ["vpt"] * 3
    assert [guess_reader(path) for path in (tmp_path / "m", stream)] == ["minerl"] * 2
    assert guess_reader(tmp_path / "p") == guess_reader(tmp_path / "p" / "one.mp4") == "video"
    for empty in (tmp_path / "nowhere", tmp_path / "p" / "metrics.jsonl"):
        with pytest.raises(ValueError, match="does not exist|looks like none of the known formats"):
            guess_reader(empty)


def test_vpt_recordings(tmp_path: Path, write_vpt: Callable) -> None:
    rows = [{"keys": ["w"], "buttons": [0], "newButtons": [0] * (t == 0), "isGuiOpen": t > 7, "hotbar": int(t > 4)} for t in range(12)]
    write_vpt(tmp_path / "a.mp4", rows, 11)
    write_vpt(tmp_path / "b.mp4", rows[:10])
    write_vpt(tmp_path / "c.mp4", rows)
    (tmp_path / "c.jsonl").write_text("{}")
    write_vpt(tmp_path / "d.mp4", rows).with_suffix(".jsonl").unlink()
    found = inspect_path(tmp_path)
    assert found.kind == "recordings, read as vpt" and found.tally.lengths == [11, 10]
    assert found.notes == [
        "22 ticks of an attack that nobody pressed were released",
        "2 turns of the mouse wheel were taken as keys of the hotbar",
        "1 rows of actions without a frame were dropped",
        "5 frames with a GUI open",
    ]
    assert [problem.split(": ")[1] for problem in found.problems] == [
        "no .jsonl beside it",
        "line 1 is no row of a VPT recording ('mouse' is missing); repair it or move it away",
    ]
    assert "forward 100.0 %" in found.text() and "returns     not known" in found.text()
    masked = inspect_path(tmp_path / "a.mp4", "vpt", {"gui": "mask", "size": [16, 16]})
    assert "72.7 % known" in masked.text() and "3 x 16 x 16" in masked.text()


def test_notes_come_along_into_a_store(tmp_path: Path, write_minerl: Callable) -> None:
    place = np.array(["none", "dirt", "none", "dirt", "dirt", "none"])
    write_minerl(tmp_path / "in" / "MineRLNavigate-v0" / "v4_one", action_place=place)
    import_recordings(tmp_path / "in", tmp_path / "store", "minerl")
    for path in (tmp_path / "in", tmp_path / "store"):
        assert inspect_path(path).notes == ["3 frames before the beginning of an episode were skipped", "3 uses of place were dropped"]


def test_what_cannot_be_inspected_is_named(tmp_path: Path, write_vpt: Callable, store: EpisodeStore) -> None:
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        inspect_path(tmp_path / "nowhere")
    write_vpt(tmp_path / "bad" / "a.mp4", [{}]).with_suffix(".jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"none of 1 recordings can be read; the first: .*a\.jsonl: line 1"):
        inspect_path(tmp_path / "bad")
    store.path.rename(tmp_path / "episodes")
    with pytest.raises(ValueError, match="is the folder of a run; inspect .*episodes"):
        inspect_path(tmp_path)
    with pytest.raises(ValueError, match="episodes: is a store, which takes no options; got size"):
        inspect_path(tmp_path / "episodes", None, {"size": [8, 8]})


def test_the_command(tmp_path: Path, write_vpt: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    write_vpt(tmp_path / "in" / "a.mp4", [{"keys": ["w"]}] * 5)
    words = ["inspect", str(tmp_path / "in"), "--reader", "vpt", "--option", "size=[16, 24]", "--option", "skip_first=1"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--max-episodes", "1"]) == 0
    text = capsys.readouterr().out
    assert "recordings, read as vpt" in text and "forward 100.0 %" in text and "3 x 16 x 24" in text
    assert text.splitlines()[-2:] == [f"written: {tmp_path / 'out' / name}" for name in ("inspect.json", "contact_sheet.png")]
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["lengths"] == [4]
    picture = Image.open(io.BytesIO((tmp_path / "out" / "contact_sheet.png").read_bytes()))
    assert picture.size == (4 * (288 + 6) + 6, 192 + 30 + 6)
    assert cli.main(["inspect", str(tmp_path / "in")]) == 0
    assert "written" not in capsys.readouterr().out


def test_real_recordings(sample_data: Path) -> None:
    found = inspect_path(sample_data / "vpt")
    assert sorted(found.tally.lengths) == [445, 1056] and found.problems == []
    assert f"{(445 - 291) + (1056 - 852)} frames with a GUI open" in found.notes
    assert "1 rows of actions without a frame were dropped" in found.notes
    assert inspect_path(sample_data / "minerl_navigate").tally.lengths == [500] * 4
