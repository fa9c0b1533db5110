"""Crafter Chop: a small arena of grass and trees in Crafter's engine, with Crafter's textures. +1 for every tree taken.

The rules (walking, facing, collecting) are ``crafter.objects.Player``'s and ``crafter.engine.World``'s. The generator is
ours, because Crafter's own episodes depend on ``hash()`` and on memory addresses; here an episode depends on
``reset(seed=...)`` alone. The picture equals ``crafter.engine.LocalView``'s pixel for pixel, without its Python loops.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import gymnasium
import numpy as np
from crafter import constants, engine, objects
from jaxtyping import Int, UInt8
from pydantic import Field, model_validator

from dreamer.types import Config

ACTION_NAMES = ("noop", "left", "right", "up", "down", "do")
_CRAFTER_ACTIONS = ("noop", "move_left", "move_right", "move_up", "move_down", "do")
_MATERIALS: list[str] = vars(constants)["materials"]  # Crafter fills this module from its data.yaml
_MATERIAL_IDS = {name: index + 1 for index, name in enumerate(_MATERIALS)}
WATER, GRASS, TREE = _MATERIAL_IDS["water"], _MATERIAL_IDS["grass"], _MATERIAL_IDS["tree"]
OUTSIDE = len(_MATERIAL_IDS) + 1  # beyond the world's edge, drawn grey


class CrafterChopConfig(Config):
    """Sizes are in tiles, as (width, height). The border of water is one tile wide when the camera shows the whole arena,
    and wide enough to fill the view when the camera follows the player."""

    camera: Literal["player", "arena"] = "player"
    view: tuple[int, int] = (8, 8)
    arena: tuple[int, int] | None = None  # interior; None: 12 x 12 for "player", what fits into the view for "arena"
    border: bool = True
    tree_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    length: int = Field(64, ge=1)
    size: int = Field(64, ge=8)  # pixels, of both sides

    @model_validator(mode="after")
    def _sizes_fit(self) -> CrafterChopConfig:
        if min(self.view) < 1 or any(self.size % tiles for tiles in self.view):
            raise ValueError(f"view: {self.view} tiles do not divide {self.size} pixels; choose divisors such as (8, 8)")
        width, height = self.interior
        if width < 1 or height < 1 or width * height < 2:
            raise ValueError(f"arena: an interior of {(width, height)} has no room for a player and a tree; expected at least (2, 1)")
        if self.camera == "arena" and any(a > v for a, v in zip(self.area, self.view, strict=True)):
            raise ValueError(f"arena: {self.area} tiles with the border do not fit into the view of {self.view}; enlarge view")
        return self

    @property
    def border_width(self) -> tuple[int, int]:
        if not self.border:
            return 0, 0
        return (1, 1) if self.camera == "arena" else (self.view[0] // 2, self.view[1] // 2)

    @property
    def interior(self) -> tuple[int, int]:
        if self.arena is not None:
            return self.arena
        if self.camera == "player":
            return 12, 12
        return self.view[0] - 2 * self.border_width[0], self.view[1] - 2 * self.border_width[1]

    @property
    def area(self) -> tuple[int, int]:
        """The world with its border."""
        return self.interior[0] + 2 * self.border_width[0], self.interior[1] + 2 * self.border_width[1]


class CrafterChop(gymnasium.Env):
    """Options are the fields of :class:`CrafterChopConfig`. ``world`` and ``player`` are Crafter's own objects."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's class attribute)
    action_names = ACTION_NAMES

    def __init__(self, **options: Any) -> None:
        self.config = CrafterChopConfig(**options)
        self.render_mode = "rgb_array"
        size = self.config.size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(ACTION_NAMES))
        self.world = engine.World(self.config.area, _MATERIALS, (12, 12))
        self.player: objects.Player | None = None
        self._unit = (size // self.config.view[0], size // self.config.view[1])
        self._num_steps = 0
        self._num_taken = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.world.reset(seed=int(self.np_random.integers(2**31 - 1)))
        self.world.daylight = 1.0
        self.player = objects.Player(self.world, self._generate())
        self.world.add(self.player)
        self._num_steps = self._num_taken = 0
        return self.render(), self._info()

    def step(self, action: int | np.integer) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool, bool, dict[str, Any]]:
        if self.player is None or self._num_steps >= self.config.length:
            raise ValueError("crafter-chop: step() needs a running episode; call reset() first")
        if not 0 <= action < len(ACTION_NAMES):
            raise ValueError(f"crafter-chop: action is {action!r}; expected 0..{len(ACTION_NAMES) - 1} {ACTION_NAMES}")
        target = (self.player.pos[0] + self.player.facing[0], self.player.pos[1] + self.player.facing[1])
        is_taken = ACTION_NAMES[action] == "do" and self.world[target][0] == "tree"
        self.player.action = _CRAFTER_ACTIONS[action]
        self.player.update()
        if is_taken:
            self.world[target] = "grass"  # Crafter's versions differ in what a tree leaves behind
        self._num_steps += 1
        self._num_taken += is_taken
        return self.render(), float(is_taken), False, self._num_steps >= self.config.length, self._info()

    def view_origin(self) -> tuple[int, int]:
        """The world's coordinates of the picture's top left tile."""
        (width, height), area = self.config.view, self.config.area
        if self.config.camera == "arena":
            return -((width - area[0]) // 2), -((height - area[1]) // 2)
        assert self.player is not None
        return int(self.player.pos[0]) - width // 2, int(self.player.pos[1]) - height // 2

    def visible_tiles(self) -> Int[np.ndarray, "width height"]:
        """Material ids of the tiles in the picture, indexed [x, y]: all that a fair player may look at."""
        (width, height), (area_x, area_y) = self.config.view, self.config.area
        x, y = self.view_origin()
        tiles = np.full((width, height), OUTSIDE)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, area_x), min(y + height, area_y)
        tiles[left - x : right - x, top - y : bottom - y] = self.world._mat_map[left:right, top:bottom]
        return tiles

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        assert self.player is not None
        (unit_x, unit_y), size = self._unit, self.config.size
        tiles = self.visible_tiles().T
        image = _material_tiles(self._unit)[tiles].swapaxes(1, 2).reshape(size, size, 3)
        x, y = np.subtract(self.player.pos, self.view_origin())
        cell = _player_tile(self.player.texture, int(tiles[y, x]), self._unit)
        image[y * unit_y : (y + 1) * unit_y, x * unit_x : (x + 1) * unit_x] = cell
        return image

    def _info(self) -> dict[str, Any]:
        return {"trees_taken": self._num_taken, "trees_left": int(self.world.count("tree"))}

    def _generate(self) -> tuple[int, int]:
        """Fill the world; return where the player starts.

        The interior is one 4-connected area, so unless it is all grass, the grass that the player can walk on touches a
        tree: at least one tree is always within reach.
        """
        (border_x, border_y), (width, height) = self.config.border_width, self.config.interior
        num_trees = min(max(round(self.config.tree_fraction * width * height), 1), width * height - 1)
        order = self.np_random.permutation(width * height)
        interior = np.full(width * height, GRASS, np.uint8)
        interior[order[:num_trees]] = TREE
        self.world._mat_map[:] = WATER
        self.world._mat_map[border_x : border_x + width, border_y : border_y + height] = interior.reshape(width, height)
        return int(order[-1]) // height + border_x, int(order[-1]) % height + border_y


@functools.cache
def _textures() -> engine.Textures:
    return engine.Textures(constants.root / "assets")


@functools.cache
def _material_tiles(unit: tuple[int, int]) -> UInt8[np.ndarray, "materials unit_y unit_x 3"]:
    """Every material's tile at its id, upright (Crafter's textures are indexed [x, y])."""
    tiles = np.full((OUTSIDE + 1, unit[1], unit[0], 3), 127, np.uint8)
    for name, index in _MATERIAL_IDS.items():
        tiles[index] = _textures().get(name, unit)[..., :3].swapaxes(0, 1)
    return tiles


@functools.cache
def _player_tile(texture: str, material: int, unit: tuple[int, int]) -> UInt8[np.ndarray, "unit_y unit_x 3"]:
    """The player blended over the tile that it stands on, by Crafter's own arithmetic."""
    canvas = _material_tiles(unit)[material].swapaxes(0, 1).copy()
    engine._draw_alpha(canvas, (0, 0), _textures().get(texture, unit))
    return canvas.swapaxes(0, 1)
