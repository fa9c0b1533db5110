"""The camera's classes against values computed by hand, and what the action spaces hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer.ops.minecraft import (
    CAMERA,
    CAMERA_STILL,
    ITEM_ACTIONS,
    MINERL,
    MINERL_ITEMS,
    MINERL_KEYS,
    VPT,
    VPT_KEYS,
    camera_label,
    decode_camera,
    encode_camera,
)
from dreamer.types import ActionSpace

# mu = 10: the middle of bin 5 + k is 11 ** (k / 5) - 1 degrees, its edges lie half a bin beside it
CENTRES = [-10, -5.8095, -3.2154, -1.6095, -0.6154, 0, 0.6154, 1.6095, 3.2154, 5.8095, 10]
EDGES = [0.2710, 1.0532, 2.3166, 4.3582, 7.6548]


def test_the_spaces():
    assert MINERL_KEYS == ("forward", "back", "left", "right", "jump", "sneak", "sprint", "attack")
    assert [(c.name, c.kind, c.size) for c in MINERL.components] == [("keyboard", "binary", 8), ("camera", "categorical", 121)]
    assert [(c.name, c.kind, c.size) for c in VPT.components] == [("keyboard", "binary", 23), ("camera", "categorical", 121)]
    assert VPT_KEYS[:8] == MINERL_KEYS and len(set(VPT_KEYS)) == 23
    assert [len(items) for items in ITEM_ACTIONS.values()] == [7, 8, 5, 8, 3] and MINERL_ITEMS.num_columns == 14
    assert all(items[0] == "none" for items in ITEM_ACTIONS.values())
    for space in (MINERL, VPT, MINERL_ITEMS):
        assert ActionSpace.from_json(space.to_json()) == space


def test_a_class_is_decoded_to_its_middle():
    degrees = decode_camera(np.arange(121))
    assert np.allclose(degrees.reshape(11, 11, 2)[:, 0, 0], CENTRES, atol=5e-5)  # pitch: bins of eleven
    assert np.allclose(degrees.reshape(11, 11, 2)[0, :, 1], CENTRES, atol=5e-5)  # yaw: one by one
    assert decode_camera(np.array(60)).tolist() == [0, 0]
    assert decode_camera(np.array([0, 120])).tolist() == [[-10, -10], [10, 10]]
    assert math.isclose(decode_camera(np.array(61))[1], 11**0.2 - 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_turn_falls_into_the_bin_around_it(axis, sign):
    step = (11, 1)[axis] * sign
    for k, edge in enumerate(EDGES):
        for degrees, bin_number in ((edge - 1e-3, k), (edge + 1e-3, k + 1)):
            turn = np.zeros(2)
            turn[axis] = sign * degrees
            assert encode_camera(turn) == 60 + step * bin_number, (turn, bin_number)


def test_turns_are_clipped_at_ten_degrees():
    assert encode_camera(np.array([[0, 0], [10, -10], [180, -180], [1e30, -1e30]])).tolist() == [CAMERA_STILL, 110, 110, 110]


def test_turns_under_one_degree_are_kept():
    """An array of whole numbers, as in VPT's own loader, would lose them."""
    turns = np.array([[0.0, 3 * 0.15]])
    assert encode_camera(turns).tolist() == [61] and encode_camera(turns.astype(int)).tolist() == [60]


def test_every_class_survives_the_way_there_and_back():
    classes = np.arange(121).reshape(11, 11)
    assert np.array_equal(encode_camera(decode_camera(classes)), classes)


@given(st.lists(st.floats(-200, 200), min_size=2, max_size=2))
def test_the_quantiser_is_odd_and_near(turn):
    turn = np.array(turn)
    index = encode_camera(turn)
    assert encode_camera(-turn) == 120 - index
    turn = np.clip(turn, -10, 10)
    # a bin is 0.2 wide where |degrees| + 1 = 11 ** companded
    assert (np.abs(decode_camera(index) - turn) <= (11**0.1 - 1) * (1 + np.abs(turn)) + 1e-9).all()


def test_what_is_no_turn_or_no_class_is_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            encode_camera(np.array([0.0, bad]))
    for bad in (-1, 121):
        with pytest.raises(ValueError, match=r"camera classes in .*; expected \[0, 120\]"):
            decode_camera(np.array([60, bad]))


def test_labels_are_words():
    assert [camera_label(i) for i in (60, 61, 59, 71, 49, 0, 120)] == [
        "still",
        "right 0.6",
        "left 0.6",
        "down 0.6",
        "up 0.6",
        "up 10 left 10",
        "down 10 right 10",
    ]
    assert len(set(CAMERA.labels)) == 121
