"""MineRL's named actions as columns."""

import numpy as np
import pytest

from dreamer.data.minecraft import minerl_columns
from dreamer.ops.minecraft import MINERL, MINERL_ITEMS, MINERL_KEYS


def actions(num: int = 4, **more) -> dict[str, np.ndarray]:
    keys = {key: (np.arange(num) == i).astype(int) for i, key in enumerate(MINERL_KEYS)}
    return keys | {"camera": np.array([[0, 0], [0, 0.6], [-3, 0], [10, 10]])[:num].astype(np.float32)} | more


def test_minerl_actions_are_put_in_order():
    columns, dropped = minerl_columns(dict(sorted(actions().items())), "here")
    assert np.array_equal(columns[:, :8], np.eye(4, 8)) and columns[:, 8].tolist() == [60, 61, 60 - 33, 120]
    assert columns.dtype == np.float32 and dropped == {}
    MINERL.validate(columns, "here")


@pytest.mark.parametrize("kind", ["U", "S"])
def test_items_are_dropped_and_counted_or_kept(kind):
    used = {"place": np.array(["none", "dirt", "dirt", "torch"], kind), "craft": np.array(["none"] * 4, kind)}
    columns, dropped = minerl_columns(actions(**used), "here")
    assert columns.shape == (4, 9) and dropped == {"place": 3}
    columns, dropped = minerl_columns(actions(**used), "here", item_actions=True)
    assert dropped == {} and columns[:, 9].tolist() == [0, 1, 1, 6] and not columns[:, 10:].any()
    MINERL_ITEMS.validate(columns, "here")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vector": np.zeros((4, 64))}, "here: got the actions .*'vector'"),
        ({"attack": np.zeros(3)}, r"here: got attack of float64 \(3,\); expected numbers \(4,\)"),
        ({"camera": np.zeros(4)}, r"here: got camera of float64 \(4,\); expected numbers \(4, 2\)"),
        ({"attack": np.array(list("abcd"))}, "here: got attack of <U1"),
        ({"camera": np.full((4, 2), np.nan)}, "here: the camera holds NaN"),
        ({"place": np.array(["none", "dirt", "cake", "none"])}, "here: action 'place' is 'cake'; expected one of none, dirt"),
        ({"place": np.array([0, 1, 2, 0])}, "here: action 'place' is '1'|here: action 'place' is '0'"),
    ],
)
def test_other_actions_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        minerl_columns(actions(**more), "here", item_actions=True)


def test_missing_keys_are_named():
    some = actions()
    del some["sneak"]
    with pytest.raises(ValueError, match="here: got the actions .*; expected .*'sneak'"):
        minerl_columns(some, "here")
