"""Real environments behind Gymnasium's protocol: uint8 pictures (H, W, 3), and who plays in them.

A new environment is one file here and one line in ``ENVS``; its scripted players are a line in ``players.PLAYERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
from pydantic import ValidationError

from dreamer.envs.crafter_chop import CrafterChop
from dreamer.envs.gym_env import GymEnv, check_gym_id
from dreamer.envs.minecraft import MineRL, MineStudio
from dreamer.envs.minigrid import MiniGrid
from dreamer.envs.players import PLAYERS, make_player

ENVS: dict[str, Callable[..., gymnasium.Env]] = {
    "crafter-chop": CrafterChop,
    "minigrid": MiniGrid,
    "minerl": MineRL,
    "minestudio": MineStudio,
    "gym": GymEnv,
}

__all__ = ["ENVS", "PLAYERS", "CrafterChop", "GymEnv", "MineRL", "MineStudio", "MiniGrid", "env_kind", "make_env", "make_player"]


def env_kind(name: str) -> str:
    """The key of ``ENVS`` that makes ``name``: a key itself, an id of MineRL, or any id in Gymnasium's registry."""
    if name in ENVS:
        return name
    if name.startswith("MineRL"):
        return "minerl"
    check_gym_id(name, others=tuple(ENVS))
    return "minigrid" if name.startswith("MiniGrid-") else "gym"


def make_env(name: str, **options: Any) -> gymnasium.Env:
    """An environment by a name of ``ENVS`` or by an id; ``options`` are the fields of its config class.

    Raises ``ValueError`` that tells the nearest names if ``name`` is unknown, or the wrong option.
    """
    kind = env_kind(name)
    try:
        return ENVS[kind](**options) if name == kind else ENVS[kind](**options | {"id": name})
    except ValidationError as error:
        raise ValueError(f"environment {name!r}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, first['loc']))}: {message}; got {first['input']!r}" if first["loc"] else message
