"""Who plays while episodes are recorded: random, scripted, noisy and lazy players.

A player sees what the picture shows and no more: recordings of players that react to hidden things teach a policy to
guess. Every player draws from its own generator, seeded in ``reset``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import ValidationError, validate_call

from dreamer.envs.chop_players import ChopPlayer, LazyPlayer
from dreamer.envs.grid_player import GridPlayer
from dreamer.envs.seeding import player_rng
from dreamer.types import Env, Player


class RandomPlayer:
    """Uniformly random actions, in any environment."""

    name = "random"

    def reset(self, env: Env, seed: int) -> None:
        self._space = copy.deepcopy(env.action_space)
        self._space.seed(int(player_rng(seed).integers(2**31)))

    def act(self, frame: np.ndarray) -> Any:
        return self._space.sample()


class NoisyPlayer:
    """``expert``, but a share ``epsilon`` of all actions is random; a random action is repeated ``sticky`` times."""

    def __init__(self, expert: Player, epsilon: float = 0.5, sticky: int = 1) -> None:
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"noisy player: epsilon is {epsilon}; expected 0..1")
        if sticky < 1:
            raise ValueError(f"noisy player: sticky is {sticky}; expected at least 1")
        self.name = f"noisy-{epsilon:g}" + (f"-sticky-{sticky}" if sticky > 1 else "")
        self.epsilon = epsilon
        self._expert, self._random, self._sticky = expert, RandomPlayer(), sticky
        # A run of `sticky` random actions starts with this probability, so that their share is epsilon.
        self._start_probability = epsilon / (sticky * (1.0 - epsilon) + epsilon)

    def reset(self, env: Env, seed: int) -> None:
        self._expert.reset(env, seed)
        self._random.reset(env, seed)
        self._rng = player_rng(seed)
        self._held: list[Any] = []

    def act(self, frame: np.ndarray) -> Any:
        if self._held:
            return self._held.pop()
        if self._rng.random() >= self._start_probability:
            return self._expert.act(frame)
        action = self._random.act(frame)
        self._held = [action] * (self._sticky - 1)
        return action


def _noisy(expert: Callable[[], Player]) -> Callable[..., NoisyPlayer]:
    @validate_call
    def make(epsilon: float = 0.5, sticky: int = 1) -> NoisyPlayer:
        return NoisyPlayer(expert(), epsilon, sticky)

    return make


PLAYERS: dict[str, dict[str, Callable[..., Player]]] = {
    "crafter-chop": {"random": RandomPlayer, "scripted": ChopPlayer, "noisy": _noisy(ChopPlayer), "lazy": LazyPlayer},
    "minigrid": {"random": RandomPlayer, "scripted": GridPlayer, "noisy": _noisy(GridPlayer)},
}


def make_player(name: str, env_name: str, /, **options: Any) -> Player:
    """The player ``name`` for the environment ``env_name`` (as given to ``make_env``).

    Raises ``ValueError`` that lists what exists, if there is no such player or option, or names an option that cannot be used.
    """
    makers = PLAYERS.get("minigrid" if env_name.startswith("MiniGrid-") else env_name, {"random": RandomPlayer})
    if name not in makers:
        raise ValueError(f"unknown player {name!r} for environment {env_name!r}; expected one of {', '.join(makers)}")
    accepted = inspect.signature(makers[name]).parameters
    if unknown := [option for option in options if option not in accepted]:
        raise ValueError(f"player {name!r} has no option {unknown[0]!r}; expected one of {', '.join(accepted) or 'none'}")
    try:
        return makers[name](**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"player {name!r}: {first['loc'][0]}: {first['msg']}; got {first['input']!r}") from error
