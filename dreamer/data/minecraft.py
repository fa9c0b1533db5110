"""The actions of Minecraft recordings as columns: which keys there are, and how a turn of the camera becomes one of 121 classes.

The camera's quantiser is VPT's (arXiv 2206.11795; ``CameraQuantizer`` in openai/Video-Pre-Training): each axis is clipped to +-10 degrees
a tick, companded by the mu-law with mu = 10 and rounded to 11 bins, so that small turns are told apart better than large ones::

    bin       0      1       2       3       4      5  6      7      8      9      10
    degrees   -10    -5.809  -3.215  -1.609  -0.615 0  0.615  1.609  3.215  5.809  10

A class is ``pitch bin * 11 + yaw bin``; 60 is a camera at rest. Pitch grows downwards, yaw to the right, as in the game.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer, Shaped

from dreamer.types import ActionComponent, ActionSpace

CAMERA_BINS = 11  # an axis
CAMERA_MAX = 10.0  # degrees a tick
CAMERA_MU = 10.0
CAMERA_STILL = CAMERA_BINS * CAMERA_BINS // 2

MINERL_KEYS = ("forward", "back", "left", "right", "jump", "sneak", "sprint", "attack")
VPT_KEYS = (*MINERL_KEYS, "use", "drop", "inventory", "swapHands", "pickItem", "ESC", *(f"hotbar.{i}" for i in range(1, 10)))

# What MineRL's Navigate and Obtain environments let a player do beside moving: at most one item of each list in a tick.
ITEM_ACTIONS = {
    "place": ("none", "dirt", "stone", "cobblestone", "crafting_table", "furnace", "torch"),
    "equip": ("none", "air", "wooden_axe", "wooden_pickaxe", "stone_axe", "stone_pickaxe", "iron_axe", "iron_pickaxe"),
    "craft": ("none", "torch", "stick", "planks", "crafting_table"),
    "nearbyCraft": ("none", "wooden_axe", "wooden_pickaxe", "stone_axe", "stone_pickaxe", "iron_axe", "iron_pickaxe", "furnace"),
    "nearbySmelt": ("none", "iron_ingot", "coal"),
}


def encode_camera(degrees: Shaped[np.ndarray, "*b 2"]) -> Int64[np.ndarray, "*b"]:
    """The classes of turns by (pitch, yaw) degrees. Raises ``ValueError`` for NaN and infinity."""
    turns = np.asarray(degrees, np.float64)
    if not np.isfinite(turns).all():
        raise ValueError("the camera holds NaN or infinity; expected degrees")
    scaled = np.clip(turns / CAMERA_MAX, -1, 1)
    companded = np.sign(scaled) * np.log1p(CAMERA_MU * np.abs(scaled)) / np.log1p(CAMERA_MU)
    bins = np.round((companded + 1) * (CAMERA_BINS - 1) / 2).astype(np.int64)
    return np.asarray(bins[..., 0] * CAMERA_BINS + bins[..., 1])


def decode_camera(classes: Integer[np.ndarray, "*b"]) -> Float64[np.ndarray, "*b 2"]:
    """The (pitch, yaw) degrees in the middle of each class. Raises ``ValueError`` for what is no class."""
    if classes.size and (classes.min() < 0 or classes.max() >= CAMERA_BINS**2):
        raise ValueError(f"camera classes in [{classes.min()}, {classes.max()}]; expected [0, {CAMERA_BINS**2 - 1}]")
    companded = np.stack(np.divmod(classes, CAMERA_BINS), -1) * 2 / (CAMERA_BINS - 1) - 1
    return np.sign(companded) * ((1 + CAMERA_MU) ** np.abs(companded) - 1) / CAMERA_MU * CAMERA_MAX


def camera_label(index: int) -> str:
    """A class in words, in degrees: ``still``, ``down 1.6``, ``up 0.6 left 10``."""
    pitch, yaw = decode_camera(np.array(index)).tolist()
    words = [(("down", "up")[pitch < 0], pitch), (("right", "left")[yaw < 0], yaw)]
    return " ".join(f"{word} {f'{abs(turn):.1f}'.removesuffix('.0')}" for word, turn in words if turn) or "still"


CAMERA = ActionComponent("camera", "categorical", CAMERA_BINS**2, labels=tuple(camera_label(i) for i in range(CAMERA_BINS**2)))
MINERL = ActionSpace((ActionComponent("keyboard", "binary", len(MINERL_KEYS), labels=MINERL_KEYS), CAMERA))
VPT = ActionSpace((ActionComponent("keyboard", "binary", len(VPT_KEYS), labels=VPT_KEYS), CAMERA))
MINERL_ITEMS = ActionSpace(
    (*MINERL.components, *(ActionComponent(name, "categorical", len(items), labels=items) for name, items in ITEM_ACTIONS.items()))
)


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
