"""A player for MiniGrid tasks whose goal is a green square, behind doors and keys if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np

from dreamer.envs.minigrid import MiniGrid
from dreamer.envs.planning import shortest_plan
from dreamer.types import Env

_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # MiniGrid's order: right, down, left, up
_State = tuple[int, int, int]  # x, y, direction


class GridPlayer:
    """Walks to the goal if there is a way; else opens a door that it can open; else fetches a key; else turns about."""

    name = "scripted"

    def reset(self, env: Env, seed: int) -> None:
        layer: Any = env
        while not isinstance(layer, MiniGrid):
            if not isinstance(layer, gymnasium.Wrapper):
                raise ValueError(f"player {self.name!r}: made for minigrid; got {type(layer).__name__}")
            layer = layer.env
        if missing := {"left", "right", "forward", "pickup", "toggle"}.difference(layer.action_names):
            raise ValueError(f"player {self.name!r}: needs the actions {sorted(missing)}, which this minigrid does not offer")
        self._names = layer.action_names
        self._world: Any = layer.unwrapped

    def act(self, frame: np.ndarray) -> int:
        world = self._world
        start: _State = (int(world.agent_pos[0]), int(world.agent_pos[1]), int(world.agent_dir))
        stages: list[tuple[str | None, Callable[[_State], bool]]] = [
            (None, lambda state: self._kind(state[0], state[1]) == "goal"),
            ("toggle", lambda state: self._opens(self._front(state))),
            ("pickup", lambda state: world.carrying is None and self._kind(*self._front(state)) == "key"),
        ]
        for last_action, is_goal in stages:
            plan = shortest_plan(start, self._successors, is_goal)
            if plan:
                return plan[0]
            if plan is not None and last_action is not None:
                return self._names.index(last_action)
        return self._names.index("left")

    def _successors(self, state: _State) -> Iterator[tuple[int, _State]]:
        x, y, direction = state
        ahead = self._front(state)
        if self._is_free(*ahead):
            yield self._names.index("forward"), (*ahead, direction)
        yield self._names.index("left"), (x, y, (direction - 1) % 4)
        yield self._names.index("right"), (x, y, (direction + 1) % 4)

    def _front(self, state: _State) -> tuple[int, int]:
        dx, dy = _DIRECTIONS[state[2]]
        return state[0] + dx, state[1] + dy

    def _kind(self, x: int, y: int) -> str | None:
        thing = self._world.grid.get(x, y)
        return None if thing is None else thing.type

    def _is_free(self, x: int, y: int) -> bool:
        thing = self._world.grid.get(x, y)
        return thing is None or (thing.can_overlap() and thing.type != "lava")

    def _opens(self, position: tuple[int, int]) -> bool:
        thing, key = self._world.grid.get(*position), self._world.carrying
        if thing is None or thing.type != "door" or thing.is_open:
            return False
        return not thing.is_locked or (key is not None and key.type == "key" and key.color == thing.color)
