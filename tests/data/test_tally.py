import numpy as np
import pytest

from dreamer.data.tally import ActionTally, EpisodeTally, spread
from dreamer.ops.minecraft import CAMERA
from dreamer.types import ActionComponent, ActionSpace

MOVE = ActionComponent("move", "categorical", 4, labels=("left", "stay", "right", "jump"))
KEYS = ActionComponent("keys", "binary", 2)
TURN = ActionComponent("turn", "continuous", 2, -1.0, 1.0, labels=("pitch", "yaw"))


def test_categories_are_counted():
    tally = ActionTally(MOVE)
    tally.add(np.array([[0], [2], [2]], np.float32))
    tally.add(np.array([[2]], np.float32))
    assert tally.shares.tolist() == [0.25, 0, 0.75, 0]
    assert tally.lines() == ["right 75.0 %, left 25.0 %", "never: stay, jump"]
    assert tally.to_json() == {
        "name": "move",
        "kind": "categorical",
        "num_known": 4,
        "shares": {"left": 0.25, "stay": 0, "right": 0.75, "jump": 0},
    }


def test_keys_are_counted_by_themselves():
    tally = ActionTally(KEYS)
    tally.add(np.array([[1, 1], [0, 1]], np.float32))
    assert tally.lines() == ["1 100.0 %, 0 50.0 %"]


def test_numbers_fall_into_bins():
    tally = ActionTally(TURN)
    tally.add(np.array([[-1, 0.05], [1, 0.05], [0.99, -0.05], [0, 0]], np.float32))
    assert tally.counts[0].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2] and tally.counts[1].tolist() == [0, 0, 0, 0, 1, 3, 0, 0, 0, 0]
    lines = tally.lines()
    assert [line.split()[0] for line in lines] == ["from", "pitch", "yaw"]
    assert lines[2].split()[1:] == ["0.0"] * 4 + ["25.0", "75.0"] + ["0.0"] * 4


def test_the_camera_is_shown_axis_by_axis():
    tally = ActionTally(CAMERA)
    tally.add(np.array([[60], [60], [61], [60 - 22]], np.float32))
    first, never, degrees, pitch, yaw = tally.lines()
    assert first == "still 50.0 %, up 1.6 25.0 %, right 0.6 25.0 %" and never == "never: 118 of 121"
    assert degrees.split()[1:] == ["-10.0", "-5.8", "-3.2", "-1.6", "-0.6", "0.0", "0.6", "1.6", "3.2", "5.8", "10.0"]
    assert pitch.split()[2:] == ["0.0"] * 3 + ["25.0", "0.0", "75.0"] + ["0.0"] * 5
    assert yaw.split()[2:] == ["0.0"] * 5 + ["75.0", "25.0"] + ["0.0"] * 4


def add(tally: EpisodeTally, length: int, known: int, reward: float, has_rewards: bool = True, ended: bool = False) -> None:
    mask = np.arange(length) < known
    actions = np.where(mask[:, None], 1, 0).astype(np.float32) * np.ones((1, 3), np.float32)
    rewards = np.where(np.arange(length) == length - 1, reward, 0).astype(np.float32)
    tally.add(actions, mask, rewards, np.arange(length) == (length - 1 if ended else -1), has_rewards)


def test_episodes_are_added_up():
    tally = EpisodeTally(ActionSpace((MOVE, KEYS)))
    add(tally, 4, 3, 2.5, ended=True)
    add(tally, 6, 2, 0.0)
    add(tally, 2, 0, 0.0, has_rewards=False)
    assert tally.known_share == 5 / 12
    found = tally.to_json()
    assert (found["lengths"], found["returns"], found["num_ended_by_themselves"]) == ([4, 6, 2], [2.5, 0], 1)
    text = dict(tally.lines("frames"))
    assert text["lengths"] == "2 to 6, median 4 frames, 12 in all"
    assert text["returns"] == "0 to 2.5, median 1.25; 1 frames with a reward; 1 episodes ended by themselves; not known of 1 episodes"
    assert text["actions"] == "41.7 % known" and text["  move"] == "stay 100.0 %"


def test_without_rewards_and_actions():
    tally = EpisodeTally(ActionSpace((MOVE, KEYS)))
    add(tally, 4, 0, 0.0, has_rewards=False)
    assert tally.lines("frames")[1:] == [("returns", "not known"), ("actions", "0.0 % known")]


@pytest.mark.parametrize(("values", "text"), [([3], "3"), ([3, 3], "3"), ([1, 2, 4, 9], "1 to 9, median 3")])
def test_spread(values, text):
    assert spread(values, ".0f") == text
