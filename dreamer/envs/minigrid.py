"""MiniGrid tasks, the whole grid in view, with the useful actions only."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from dreamer.envs.gym_env import check_gym_id
from dreamer.types import Config

ActionName = Literal["left", "right", "forward", "pickup", "drop", "toggle", "done"]
_ALL_ACTIONS: tuple[ActionName, ...] = ("left", "right", "forward", "pickup", "drop", "toggle", "done")  # MiniGrid's order
_SMALLEST_TILE = 3  # pixels; below this a key cannot be told from a goal


class MiniGridConfig(Config):
    id: str = Field("MiniGrid-DoorKey-5x5-v0", pattern="^MiniGrid-")
    size: int = Field(64, ge=8)  # pixels, of both sides
    length: int | None = Field(None, ge=1)  # time limit in steps; None: the task's own
    actions: tuple[ActionName, ...] = Field(("left", "right", "forward", "pickup", "toggle"), min_length=1)


class MiniGrid(gymnasium.Wrapper):
    """Options are the fields of :class:`MiniGridConfig`. Whole tiles are drawn and the rest of the picture stays black.
    ``info["success"]`` is True when the task was solved."""

    def __init__(self, **options: Any) -> None:
        self.config = MiniGridConfig(**options)
        check_gym_id(self.config.id)
        limit = {} if self.config.length is None else {"max_steps": self.config.length}
        super().__init__(gymnasium.make(self.config.id, render_mode="rgb_array", disable_env_checker=True, **limit))
        self.action_names = self.config.actions
        self.action_space = gymnasium.spaces.Discrete(len(self.action_names))
        size = self.config.size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        grid: Any = self.env.unwrapped
        self._tile = size // max(grid.width, grid.height)
        if self._tile < _SMALLEST_TILE:
            need = _SMALLEST_TILE * max(grid.width, grid.height)
            raise ValueError(f"{self.config.id}: size is {size} pixels for {grid.width} x {grid.height} tiles; expected at least {need}")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        return self._picture(), info

    def step(self, action: int | np.integer) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool, bool, dict[str, Any]]:
        if not 0 <= action < len(self.action_names):
            raise ValueError(f"minigrid: action is {action!r}; expected 0..{len(self.action_names) - 1} {self.action_names}")
        _, reward, terminated, truncated, info = self.env.step(_ALL_ACTIONS.index(self.action_names[action]))
        return self._picture(), float(reward), terminated, truncated, info | {"success": bool(terminated and float(reward) > 0)}

    def _picture(self) -> UInt8[np.ndarray, "H W 3"]:
        grid: Any = self.env.unwrapped
        tiles = grid.get_frame(highlight=False, tile_size=self._tile)
        image = np.zeros((self.config.size, self.config.size, 3), np.uint8)
        top, left = (self.config.size - tiles.shape[0]) // 2, (self.config.size - tiles.shape[1]) // 2
        image[top : top + tiles.shape[0], left : left + tiles.shape[1]] = tiles
        return image
