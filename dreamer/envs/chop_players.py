"""Players of Crafter Chop that look at the tiles in the picture only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import validate_call

from dreamer.envs.crafter_chop import ACTION_NAMES, GRASS, TREE, CrafterChop
from dreamer.envs.planning import shortest_plan
from dreamer.envs.seeding import player_rng
from dreamer.types import Env

NOOP, DO = ACTION_NAMES.index("noop"), ACTION_NAMES.index("do")
_MOVES = {ACTION_NAMES.index(name): step for name, step in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items()}
_ChopState = tuple[int, int, tuple[int, int]]  # x, y, facing; in tiles of the view


class ChopPlayer:
    """Takes the tree that needs the fewest steps, turns included; walks on in a straight line when it sees none."""

    name = "scripted"

    def reset(self, env: Env, seed: int) -> None:
        unwrapped = getattr(env, "unwrapped", env)
        if not isinstance(unwrapped, CrafterChop):
            raise ValueError(f"player {self.name!r}: made for crafter-chop; got {type(unwrapped).__name__}")
        self._env = unwrapped
        self._rng = player_rng(seed)
        self._heading = self._random_move()

    def act(self, frame: np.ndarray) -> int:
        self._look()
        plan = self._plan(None)
        if plan is None:
            return self._explore()
        return plan[0] if plan else DO

    def _random_move(self) -> int:
        return int(self._rng.choice(list(_MOVES)))

    def _look(self) -> None:
        player = self._env.player
        assert player is not None
        self._tiles: list[list[int]] = self._env.visible_tiles().tolist()
        self._origin = self._env.view_origin()
        facing = (int(player.facing[0]), int(player.facing[1]))
        self._state: _ChopState = (int(player.pos[0]) - self._origin[0], int(player.pos[1]) - self._origin[1], facing)

    def _tile(self, x: int, y: int) -> int | None:
        return self._tiles[x][y] if 0 <= x < len(self._tiles) and 0 <= y < len(self._tiles[0]) else None

    def _successors(self, state: _ChopState) -> Iterator[tuple[int, _ChopState]]:
        x, y, _ = state
        for action, (dx, dy) in _MOVES.items():
            is_free = self._tile(x + dx, y + dy) == GRASS
            yield action, (x + dx, y + dy, (dx, dy)) if is_free else (x, y, (dx, dy))

    def _plan(self, target: tuple[int, int] | None) -> list[int] | None:
        """Moves until the player faces ``target`` (a tile of the view; None: any tree); None if there is no way in sight."""

        def is_goal(state: _ChopState) -> bool:
            x, y, (dx, dy) = state
            return self._tile(x + dx, y + dy) == TREE and target in (None, (x + dx, y + dy))

        return shortest_plan(self._state, self._successors, is_goal)

    def _explore(self) -> int:
        x, y, _ = self._state
        dx, dy = _MOVES[self._heading]
        if self._tile(x + dx, y + dy) != GRASS:
            self._heading = self._random_move()
        return self._heading


class LazyPlayer(ChopPlayer):
    """Picks any tree in sight instead of the nearest, hesitates (``hesitation``: share of noops), and between two trees
    wanders about with probability ``wander`` for 4 to 12 steps."""

    name = "lazy"

    @validate_call
    def __init__(self, hesitation: float = 0.2, wander: float = 0.5) -> None:
        for field, value in (("hesitation", hesitation), ("wander", wander)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"lazy player: {field} is {value}; expected 0..1")
        self._hesitation, self._wander = hesitation, wander

    def reset(self, env: Env, seed: int) -> None:
        super().reset(env, seed)
        self._target: tuple[int, int] | None = None  # in the world's tiles: the view moves
        self._num_wander = 0

    def act(self, frame: np.ndarray) -> int:
        self._look()
        if self._rng.random() < self._hesitation:
            return NOOP
        if self._num_wander:
            self._num_wander -= 1
            if self._rng.random() < 0.4:
                self._heading = self._random_move()
            return self._explore()
        target = self._choose()
        plan = self._plan(target) if target else None
        if plan:
            return plan[0]
        self._target = None  # about to be taken, or out of reach
        if plan is None:
            return self._explore()
        if self._rng.random() < self._wander:
            self._num_wander = int(self._rng.integers(4, 13))
        return DO

    def _choose(self) -> tuple[int, int] | None:
        """The chosen tree in the view's tiles; another one when it is taken or out of sight."""
        trees = [(x, y) for x, column in enumerate(self._tiles) for y, tile in enumerate(column) if tile == TREE]
        if not trees:
            return None
        if self._target is not None:
            target = (self._target[0] - self._origin[0], self._target[1] - self._origin[1])
            if target in trees:
                return target
        x, y = trees[int(self._rng.integers(len(trees)))]
        self._target = (x + self._origin[0], y + self._origin[1])
        return x, y
