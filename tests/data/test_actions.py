import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from dreamer.data.actions import ActionCodec, action_space_from_gym, decode_action, encode_action
from dreamer.types import ActionComponent

SPACES = {
    "discrete": spaces.Discrete(6),
    "discrete from 3": spaces.Discrete(4, start=3),
    "multi discrete": spaces.MultiDiscrete([3, 5]),
    "multi discrete of rank 2": spaces.MultiDiscrete([[3, 5], [2, 7]], start=[[1, 0], [0, -2]]),
    "multi binary": spaces.MultiBinary(4),
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "uneven box": spaces.Box(np.array([-0.1, 0.0]), np.array([0.3, 10.0]), dtype=np.float64),
    "dict": spaces.Dict(
        {"attack": spaces.Discrete(2), "camera": spaces.Box(-10.0, 10.0, (2,)), "deep": spaces.Dict({"a": spaces.MultiBinary(2)})}
    ),
}


def kinds(space: gym.Space) -> list[tuple[str, str, int]]:
    return [(c.name, c.kind, c.size) for c in action_space_from_gym(space).components]


def test_components():
    assert kinds(SPACES["discrete"]) == [("action", "categorical", 6)]
    assert kinds(SPACES["multi discrete"]) == [("action_0", "categorical", 3), ("action_1", "categorical", 5)]
    assert kinds(SPACES["multi binary"]) == [("action", "binary", 4)]
    assert kinds(SPACES["box"]) == [("action", "continuous", 2)]
    assert kinds(SPACES["uneven box"]) == [("action_0", "continuous", 1), ("action_1", "continuous", 1)]
    assert kinds(SPACES["dict"]) == [("attack", "categorical", 2), ("camera", "continuous", 2), ("deep.a", "binary", 2)]


def test_start_is_taken_off():
    assert encode_action(SPACES["discrete from 3"], 5).tolist() == [2]
    assert decode_action(SPACES["discrete from 3"], np.array([2.0])) == 5


@pytest.mark.parametrize(("low", "high"), [(-np.inf, 1.0), (0.0, np.inf), (np.nan, 1.0), (-np.inf, np.inf), (1.0, 1.0), (2.0, 1.0)])
def test_a_continuous_component_has_finite_bounds(low, high):
    with pytest.raises(ValueError, match="'aim'.*expected finite bounds, low below high"):
        ActionComponent("aim", "continuous", 1, float(low), float(high))
    ActionComponent("key", "binary", 1, float(low), float(high))  # bounds are of continuous components only


def test_labels_are_checked():
    assert action_space_from_gym(spaces.Discrete(2), {"action": ("stay", "go")}).components[0].labels == ("stay", "go")
    with pytest.raises(ValueError, match="3 labels for size 2"):
        action_space_from_gym(spaces.Discrete(2), {"action": ("a", "b", "c")})
    with pytest.raises(ValueError, match="labels for action component 'move'"):
        action_space_from_gym(spaces.Discrete(2), {"move": ("a", "b")})


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 2**31))
def test_round_trip(name, seed):
    space = SPACES[name]
    space.seed(seed)
    action = space.sample()
    codec = ActionCodec(space)
    row = codec.encode(action)
    assert row.dtype == np.float32
    back = codec.decode(row)
    assert space.contains(back)
    for a, b in zip(spaces.flatten(space, action).tolist(), spaces.flatten(space, back).tolist(), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize(
    "space", [spaces.Text(4), spaces.Tuple((spaces.Discrete(2),)), spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(0, 255, (2,), np.uint8)]
)
def test_spaces_without_columns_are_refused(space):
    with pytest.raises(ValueError, match="action space 'action' is"):
        action_space_from_gym(space)


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("discrete", 6),
        ("discrete", -1),
        ("multi discrete", [0]),
        ("box", [0.0, np.nan]),
        ("box", [0.0, 1.5]),
        ("dict", 3),
        ("discrete", "up"),
    ],
)
def test_actions_outside_the_space_are_refused(name, action):
    with pytest.raises(ValueError, match="action"):
        encode_action(SPACES[name], action)


def test_rows_outside_the_space_are_refused():
    with pytest.raises(ValueError, match=r"has values in \[6, 6\]; expected \[0, 5\]"):
        decode_action(SPACES["discrete"], np.array([6.0]))
