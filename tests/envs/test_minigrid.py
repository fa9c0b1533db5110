"""MiniGrid: the picture, the reduced actions, the time limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreamer.envs.minigrid import MiniGrid


def test_picture_holds_whole_tiles_in_a_black_frame() -> None:
    env = MiniGrid()
    frame, _ = env.reset(seed=0)
    grid: Any = env.unwrapped
    np.testing.assert_array_equal(frame[2:62, 2:62], grid.get_frame(highlight=False, tile_size=12))
    assert frame[:2].max() == 0 and frame[62:].max() == 0 and frame[:, :2].max() == 0 and frame[:, 62:].max() == 0


def test_actions_do_what_their_names_say() -> None:
    env = MiniGrid(id="MiniGrid-Empty-5x5-v0", actions=("forward", "right"))
    env.reset(seed=0)
    grid: Any = env.unwrapped
    assert env.action_space.n == 2 and env.action_names == ("forward", "right")
    start = tuple(grid.agent_pos)
    env.step(0)
    assert tuple(grid.agent_pos) == (start[0] + 1, start[1])
    env.step(1)
    assert grid.agent_dir == 1
    with pytest.raises(ValueError, match=r"action is 2; expected 0\.\.1"):
        env.step(2)


def test_success_and_time_limit() -> None:
    env = MiniGrid(id="MiniGrid-Empty-5x5-v0", length=4)
    env.reset(seed=0)
    steps = [env.step(0) for _ in range(4)]
    assert [s[3] for s in steps] == [False, False, False, True] and not steps[-1][4]["success"]
    env = MiniGrid(id="MiniGrid-Empty-5x5-v0")
    env.reset(seed=0)
    for action in (2, 2, 1, 2, 2):  # along the wall to the corner
        _, reward, terminated, _, info = env.step(action)
    assert terminated and reward > 0 and info["success"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "CartPole-v1"}, "id"),
        ({"id": "MiniGrid-Nothing-v0"}, "nearest names"),
        ({"id": "MiniGrid-MultiRoom-N2-S4-v0"}, "size is 64 pixels for 25 x 25 tiles; expected at least 75"),
        ({"actions": ("left", "fly")}, "actions"),
        ({"actions": ()}, "actions"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniGrid(**options)
