"""The actions of Minecraft, in recordings and in the game: which keys there are, and how a turn of the camera becomes one of 121 classes.

The camera's quantiser is VPT's (arXiv 2206.11795; ``CameraQuantizer`` in openai/Video-Pre-Training): each axis is clipped to +-10 degrees
a tick, companded by the mu-law with mu = 10 and rounded to 11 bins, so that small turns are told apart better than large ones::

    bin       0      1       2       3       4      5  6      7      8      9      10
    degrees   -10    -5.809  -3.215  -1.609  -0.615 0  0.615  1.609  3.215  5.809  10

A class is ``pitch bin * 11 + yaw bin``; 60 is a camera at rest. Pitch grows downwards, yaw to the right, as in the game.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64, Integer, Shaped

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
ACTION_SPACES = {"minerl": MINERL, "minerl_items": MINERL_ITEMS, "vpt": VPT}
