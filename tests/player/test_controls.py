"""Buttons from action spaces, and what is held turned into actions."""

from __future__ import annotations

import numpy as np
import pytest

from dreamer.envs.crafter_chop import ACTION_NAMES
from dreamer.ops.minecraft import CAMERA, CAMERA_STILL, MINERL, MINERL_KEYS, VPT, VPT_KEYS
from dreamer.player.controls import RESERVED, Controls, Hands
from dreamer.types import ActionComponent, ActionSpace

CHOP = ActionSpace((ActionComponent("action", "categorical", 6, labels=ACTION_NAMES),))
GRID = ActionSpace((ActionComponent("action", "categorical", 5, labels=("left", "right", "forward", "pickup", "toggle")),))
CAR = ActionSpace((ActionComponent("steer", "continuous", 1, -1.0, 1.0), ActionComponent("gas", "continuous", 1, 0.5, 2.0)))


def place(controls: Controls, label: str) -> int:
    return [b.label for b in controls.buttons].index(label)


def test_doing_nothing_has_no_button_but_is_an_action() -> None:
    controls = Controls(CHOP)
    assert [b.label for b in controls.buttons] == ["left", "right", "up", "down", "do"]
    assert controls.idle is not None and controls.idle.tolist() == [0]
    assert controls.row(()).tolist() == [0] and controls.row((place(controls, "do"),)).tolist() == [5]


def test_where_nothing_is_no_action_nobody_acts_unless_something_is_pressed() -> None:
    controls = Controls(GRID)
    assert controls.idle is None and controls.row(()) is None
    assert controls.row((place(controls, "left"),)).tolist() == [0]
    with pytest.raises(ValueError, match="nobody can do nothing"):
        controls.named("noop")


def test_of_two_buttons_that_exclude_each_other_the_later_counts() -> None:
    controls = Controls(CHOP)
    left, do = place(controls, "left"), place(controls, "do")
    assert controls.row((left, do)).tolist() == [5] and controls.row((do, left)).tolist() == [1]


@pytest.mark.parametrize("space", [CHOP, GRID, CAR, MINERL, VPT], ids=["chop", "grid", "car", "minerl", "vpt"])
def test_every_key_has_one_meaning_and_the_pages_own_keys_stay_free(space: ActionSpace) -> None:
    keys = [key for button in Controls(space).buttons for key in button.keys]
    assert len(set(keys)) == len(keys) and not set(keys) & set(RESERVED)
    assert all(button.keys for button in Controls(space).buttons)


def test_keys_are_those_that_players_expect() -> None:
    def keys(space: ActionSpace, label: str) -> tuple[str, ...]:
        controls = Controls(space)
        return controls.buttons[place(controls, label)].keys

    assert keys(CHOP, "left") == ("ArrowLeft", "KeyA") and keys(GRID, "forward") == ("ArrowUp", "KeyW")
    assert keys(MINERL, "left") == ("KeyA",)  # the arrows turn the camera
    assert keys(MINERL, "look left") == ("ArrowLeft",) and keys(MINERL, "jump") == ("Space",)
    assert keys(VPT, "hotbar.3") == ("Digit3",)
    controls = Controls(VPT)
    assert controls.buttons[place(controls, "attack")].mouse == 0 and controls.buttons[place(controls, "use")].mouse == 2
    assert controls.buttons[place(controls, "forward")].direction == "up"


def test_minecraft_keys_go_together_and_the_camera_is_quantised() -> None:
    controls = Controls(MINERL)
    row = controls.row((place(controls, "forward"), place(controls, "jump")), (0.0, 10.0))
    assert row[MINERL_KEYS.index("forward")] == row[MINERL_KEYS.index("jump")] == 1 and row[:8].sum() == 2
    assert CAMERA.labels[int(row[8])] == "right 10" and controls.camera_of(row) == "right 10"
    assert controls.idle[8] == CAMERA_STILL and controls.idle[:8].sum() == 0
    looking = controls.row((place(controls, "look up"),))
    assert CAMERA.labels[int(looking[8])] == "up 3.2"  # of 4 degrees, the nearest bin


def test_continuous_columns_rest_at_nothing_and_go_to_their_ends() -> None:
    controls = Controls(CAR)
    assert controls.idle.tolist() == [0, 0.5]  # 0 lies outside the range of gas
    assert [b.label for b in controls.buttons] == ["steer −", "steer +", "gas −", "gas +"]
    assert controls.row((0, 3)).tolist() == [-1, 2]


def test_the_buttons_of_an_action_are_those_that_make_it() -> None:
    controls = Controls(VPT)
    for index, button in enumerate(controls.buttons):
        if button.turn is None:
            assert controls.buttons_of(controls.row((index,))) == [index]
    assert controls.buttons_of(controls.rest) == []


def test_actions_by_name() -> None:
    controls = Controls(VPT)
    row = controls.named("forward+jump+left 0.6")
    assert row[VPT_KEYS.index("forward")] == row[VPT_KEYS.index("jump")] == 1 and row.sum() - row[-1] == 2
    assert CAMERA.labels[int(row[-1])] == "left 0.6"
    assert controls.named("noop").tolist() == controls.rest.tolist()
    with pytest.raises(ValueError, match="'fly' means 0 things; expected one of keyboard=forward"):
        controls.named("fly")
    twice = ActionSpace(
        (ActionComponent("a", "categorical", 2, labels=("none", "dirt")), ActionComponent("b", "binary", 1, labels=("dirt",)))
    )
    with pytest.raises(ValueError, match="'dirt' means 2 things"):
        Controls(twice).named("dirt")
    assert Controls(twice).named("b=dirt").tolist() == [0, 1]


def test_a_tap_between_two_ticks_counts_for_one_tick() -> None:
    hands = Hands(Controls(CHOP))
    hands.hold(1, (1,), (0.0, 0.0))
    hands.hold(2, (1, 4), (0.0, 0.0))
    hands.hold(3, (1,), (0.0, 0.0))
    assert hands.is_fresh and hands.input == 3
    assert hands.take().tolist() == [5] and not hands.is_fresh
    assert hands.take().tolist() == [2]  # what is held goes on
    hands.release()
    assert hands.take().tolist() == [0] and not hands.is_busy


def test_turns_add_up_and_what_the_bins_leave_is_kept() -> None:
    hands = Hands(Controls(MINERL))
    hands.hold(1, (), (0.0, 7.0))
    hands.hold(2, (), (0.0, 7.0))
    first, second, third = (CAMERA.labels[int(hands.take()[8])] for _ in range(3))
    assert (first, second) == ("right 10", "right 3.2") and third in ("right 0.6", "right 1.6")  # 10 + 3.2 + the rest of 14
    hands.hold(3, (), (0.0, 1e6))
    assert [CAMERA.labels[int(hands.take()[8])] for _ in range(3)] == ["right 10", "right 10", "still"]  # bounded


def test_buttons_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 5 buttons"):
        Hands(Controls(CHOP)).hold(1, (5,), (0.0, 0.0))


def test_rows_lie_in_the_action_space() -> None:
    rng = np.random.default_rng(0)
    for space in (CHOP, GRID, CAR, MINERL, VPT):
        controls = Controls(space)
        for _ in range(20):
            pressed = tuple(rng.permutation(len(controls.buttons))[: rng.integers(1, 5)].tolist())
            space.validate(controls.row(pressed, tuple(rng.uniform(-30, 30, 2)))[None], "row")
