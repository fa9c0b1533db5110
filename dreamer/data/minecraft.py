"""MineRL's named actions, as its recordings hold them, as columns of the spaces in ``dreamer/ops/minecraft.py``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from dreamer.ops.minecraft import ITEM_ACTIONS, MINERL_KEYS, encode_camera


def is_minerl(names: set[str]) -> bool:
    """Whether these are the names of MineRL's own actions: its eight keys, the camera, and maybe some of the items."""
    needed = {*MINERL_KEYS, "camera"}
    return needed <= names <= needed | set(ITEM_ACTIONS)


def minerl_columns(
    actions: Mapping[str, np.ndarray], where: str, *, item_actions: bool = False
) -> tuple[Float32[np.ndarray, "F A"], dict[str, int]]:
    """MineRL's named actions, the camera in degrees (F, 2), as columns of ``MINERL``, or with ``item_actions`` of ``MINERL_ITEMS``.

    Also returns in how many ticks each of the items was used that the columns do not hold. Raises ``ValueError`` naming ``where`` for
    names that MineRL does not have, for missing ones, and for other shapes than one row a tick.
    """
    if not is_minerl(set(actions)):
        raise ValueError(
            f"{where}: got the actions {sorted(actions)}; expected {sorted([*MINERL_KEYS, 'camera'])} and items {[*ITEM_ACTIONS]}"
        )
    num = actions["camera"].shape[0] if actions["camera"].ndim else 0
    for name, array in actions.items():
        shape = (num, 2) if name == "camera" else (num,)
        if array.shape != shape or array.dtype.kind not in ("USiu" if name in ITEM_ACTIONS else "fiub"):
            raise ValueError(f"{where}: got {name} of {array.dtype} {array.shape}; expected numbers {shape}, one row a tick")
    try:
        columns = [actions[key] for key in MINERL_KEYS] + [encode_camera(actions["camera"])]
        if item_actions:
            columns += [_item_indices(name, actions.get(name, np.full(num, "none"))) for name in ITEM_ACTIONS]
        names = {name: actions[name].astype(str) for name in ITEM_ACTIONS if name in actions}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinity, and no action space holds that
        rows = np.stack(columns, 1).astype(np.float32)
    used = {name: int(np.count_nonzero(~np.isin(items, ("none", "0")))) for name, items in names.items()}
    return rows, {name: count for name, count in used.items() if count and not item_actions}


def _item_indices(name: str, values: np.ndarray) -> np.ndarray:
    """Names of items as their places in the list."""
    found, places = np.unique(values.astype(str), return_inverse=True)
    if strange := [item for item in found.tolist() if item not in ITEM_ACTIONS[name]]:
        raise ValueError(f"action {name!r} is {strange[0]!r}; expected one of {', '.join(ITEM_ACTIONS[name])}")
    return np.array([ITEM_ACTIONS[name].index(item) for item in found.tolist()], np.int64)[places.reshape(-1)]
