"""``dreamer dream`` and the words of both verbs."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dreamer import cli
from dreamer.player.controls import Controls
from dreamer.player.engine import DreamSettings
from dreamer.player.rollouts import Rollout, as_picture, as_video, choose_places, parse_script, roll_out
from dreamer.player.source import DreamSource

SETTINGS = DreamSettings(num_steps=2, context=4)


def test_a_dream_with_recorded_actions_stands_beside_what_was_recorded(source: DreamSource) -> None:
    rollout = roll_out(source, (1, 6), "recorded", 5, SETTINGS)
    truth = source.episodes.frames(1, 6, 12).transpose(0, 2, 3, 1)
    assert rollout.label == "episode 1, step 6" and np.array_equal(rollout.truth, truth) and rollout.dream.shape == truth.shape


def test_recorded_actions_are_those_that_follow_the_start(source: DreamSource) -> None:
    names = Controls(source.agent.action_space).space.components[0].labels
    actions = source.episodes.arrays(1, 6, 11)["actions"][:, 0].astype(int)
    script = ",".join(names[a] for a in actions)
    same = [roll_out(source, (1, 6), words, 5, SETTINGS).dream for words in ("recorded", script)]
    assert np.array_equal(*same) and not np.array_equal(same[0], roll_out(source, (1, 6), "noop", 5, SETTINGS).dream)


def test_scripts_begin_again_at_their_end(source: DreamSource) -> None:
    controls = Controls(source.agent.action_space)
    assert parse_script(controls, "right*2, do,noop")[:, 0].tolist() == [2, 2, 5, 0]
    again = [roll_out(source, (1, 6), words, 5, SETTINGS).dream for words in ("right*2,do", "right,right,do,right,right")]
    assert np.array_equal(*again)
    assert roll_out(source, (1, 6), "do", 5, SETTINGS).truth is None  # nothing of the kind was recorded


@pytest.mark.parametrize("script", ["fly", "right*", "right*0", "*3", "", "right,,do"])
def test_scripts_that_cannot_be_played(source: DreamSource, script: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_script(Controls(source.agent.action_space), script)


def test_policies_dream_by_seed(source: DreamSource) -> None:
    one, same, other = (roll_out(source, (1, 6), "policy", 6, DreamSettings(num_steps=2, context=4, seed=s)).dream for s in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_more_steps_than_were_recorded(source: DreamSource) -> None:
    with pytest.raises(ValueError, match="--steps is 15; 14 recorded actions follow episode 1, step 6"):
        roll_out(source, (1, 6), "recorded", 15, SETTINGS)
    assert len(roll_out(source, (1, 6), "noop", 15, SETTINGS).dream) == 16


def test_places_leave_room_for_what_follows(source: DreamSource) -> None:
    places = choose_places(source, [], 6, 12, SETTINGS)
    held_out = set(source.run.split(len(source.latents))[1].tolist())
    assert len(places) == 6 and all(episode in held_out and step + 12 <= 20 for episode, step in places)
    assert choose_places(source, ["3:4", "0:0"], 6, 12, SETTINGS) == [(3, 4), (0, 0)]
    with pytest.raises(ValueError, match="--start is '3'; expected episode:step"):
        choose_places(source, ["3"], 1, 1, SETTINGS)


def test_a_dream_is_as_long_as_its_recording_unless_told(run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def num_frames(*words: str) -> int:
        out = tmp_path / "dream.gif"
        assert cli.main(["dream", str(run_path), "--out", str(out), "--num", "1", "--context", "3", *words]) == 0
        return getattr(Image.open(out), "n_frames", 1)

    assert num_frames() == 21  # episodes have 20 actions
    assert num_frames("--start", "1:15", "--start", "2:12") == 6
    assert num_frames("--actions", "down*3") == 25
    capsys.readouterr()
    assert cli.main(["dream", str(run_path), "--out", str(tmp_path / "x.gif"), "--start", "1:20"]) == 2
    assert "--steps is 1; 0 recorded actions follow" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_dreamt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.png").mkdir()
    for out, said in ((tmp_path / "x.txt", "suffix '.txt'"), (tmp_path / "folder.png", "is a folder")):
        assert cli.main(["dream", "nothing", "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_grids_hold_every_clip_and_moment() -> None:
    def clip(value: int) -> np.ndarray:
        return np.stack([np.full((64, 64, 3), value + t, np.uint8) for t in range(4)])

    rollouts = [Rollout("one", clip(10), clip(50)), Rollout("two", clip(90), clip(130))]
    video, picture = as_video(rollouts), as_picture(rollouts)
    assert video.shape[0] == 4
    for t in range(4):
        values = set(np.unique(video[t]))
        assert {10 + t, 50 + t, 90 + t, 130 + t} <= values
    assert {v + t for v in (10, 50, 90, 130) for t in range(4)} <= set(np.unique(picture))


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_verb_writes_a_file(run_path: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / f"dream{suffix}"
    words = ["--num", "2", "--steps", "4", "--denoise-steps", "1", "--context", "3", "--seed", "1"]
    assert cli.main(["dream", str(run_path), "--out", str(out), *words]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    if suffix == ".mp4":
        with av.open(str(out)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 5
    else:
        assert getattr(Image.open(out), "n_frames", 1) == (5 if suffix == ".gif" else 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.txt"], "suffix '.txt'; expected .png"),
        (["--out", "x.png", "--denoise-steps", "3"], "error: denoising steps K is 3; expected one of 1, 2, 4, 8, which"),
        (["--out", "x.png", "--denoise-steps", "0"], "error: denoising steps K is 0; expected one of 1, 2, 4, 8, which"),
        (["--out", "x.png", "--context", "99"], "error: context is 99; expected 1 to 8"),
        (["--out", "x.png", "--context", "0"], "error: context is 0; expected 1 to 8"),
        (["--out", "x.png", "--seed", "-1"], "error: seed is -1; expected 0 to 2147483647"),
        (["--out", "x.png", "--start", "1:20"], "--steps is 2; 0 recorded actions follow episode 1, step 20"),
        (["--out", "x.png", "--start", "99:0"], "episode is 99"),
        (["--out", "x.png", "--num", "0"], "--num is 0"),
        (["--out", "x.png", "--threads", "0"], "--threads is 0"),
        (["--out", "x.png", "--fps", "nan"], "--fps nan"),
    ],
)
def test_bad_words_are_one_line(run_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert cli.main(["dream", str(run_path), "--steps", "2", "--num", "1", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
