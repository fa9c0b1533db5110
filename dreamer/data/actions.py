"""Actions of Gymnasium environments as the columns of one float32 array, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float, Shaped

from dreamer.ops.minecraft import ACTION_SPACES
from dreamer.types import ActionComponent, ActionSpace

SUPPORTED = "Discrete, MultiDiscrete, MultiBinary, bounded Box, and Dict of these"


def action_space_from_gym(space: gym.Space[Any], labels: Mapping[str, Sequence[str]] | None = None) -> ActionSpace:
    """The components of a Gymnasium action space.

    ``labels`` names the categories or columns of a component for people: ``{"action": ("noop", "left", ...)}``.
    Raises ``ValueError`` for kinds of spaces that cannot be put in columns.
    """
    components = _components(space, "")
    names = {c.name for c in components}
    for name in labels or {}:
        if name not in names:
            raise ValueError(f"labels for action component {name!r}; this space has {sorted(names)}")
    return ActionSpace(tuple(dataclasses.replace(c, labels=tuple((labels or {}).get(c.name, ()))) for c in components))


def as_action_space(given: ActionSpace | str | Sequence[Any]) -> ActionSpace:
    """An action space as a config can give it: by name (a key of ``ACTION_SPACES``), or as a list of components, each a mapping of
    ``name``, ``kind``, ``size`` and, if wanted, ``low``, ``high``, ``labels``. Raises ``ValueError`` for anything else."""
    if isinstance(given, ActionSpace):
        return given
    if isinstance(given, str):
        if given not in ACTION_SPACES:
            raise ValueError(f"no action space is called {given!r}; expected one of {sorted(ACTION_SPACES)}, or a list of components")
        return ACTION_SPACES[given]
    try:
        return ActionSpace.from_json(list(given))
    except (TypeError, AttributeError) as error:
        expected = "a list such as [{name: move, kind: categorical, size: 5}]"
        raise ValueError(f"action_space is {given!r}: {error}; expected {expected}") from error


def encode_action(space: gym.Space[Any], gym_action: Any) -> Float[np.ndarray, " A"]:
    """One Gymnasium action as a row of columns. Raises ``ValueError`` if it does not lie in ``space``."""
    return ActionCodec(space).encode(gym_action)


def decode_action(space: gym.Space[Any], row: Shaped[np.ndarray, " A"]) -> Any:
    """The Gymnasium action of a row of columns. Raises ``ValueError`` if the row lies outside ``space``."""
    return ActionCodec(space).decode(row)


class ActionCodec:
    """Translates between a Gymnasium action space and rows of float32 columns."""

    def __init__(self, gym_space: gym.Space[Any], labels: Mapping[str, Sequence[str]] | None = None) -> None:
        self.gym_space = gym_space
        self.space = action_space_from_gym(gym_space, labels)

    def encode(self, action: Any) -> Float[np.ndarray, " A"]:
        columns = _flatten(self.gym_space, action, "action")
        row = np.concatenate([np.asarray(c, np.float32).reshape(-1) for c in columns])
        self.space.validate(row, "action")
        return row

    def decode(self, row: Shaped[np.ndarray, " A"]) -> Any:
        row = np.asarray(row, np.float32).reshape(-1)
        self.space.validate(row, "action")
        action, used = _unflatten(self.gym_space, row)
        assert used == len(row)
        return action


def env_codec(env: gym.Env[Any, Any]) -> ActionCodec:
    """The codec of an environment's actions. Its ``action_names`` are the labels of the only component, or a dictionary of every one's."""
    names = getattr(env, "action_names", None)
    return ActionCodec(env.action_space, names if names is None or isinstance(names, Mapping) else {"action": names})


def _components(space: gym.Space[Any], name: str) -> list[ActionComponent]:
    leaf = name or "action"
    match space:
        case gym.spaces.Discrete():
            return [ActionComponent(leaf, "categorical", int(space.n))]
        case gym.spaces.MultiDiscrete():
            sizes = space.nvec.reshape(-1)
            return [ActionComponent(f"{leaf}_{i}", "categorical", int(n)) for i, n in enumerate(sizes)]
        case gym.spaces.MultiBinary():
            return [ActionComponent(leaf, "binary", int(np.prod(space.shape)))]
        case gym.spaces.Box():
            return _box_components(space, leaf)
        case gym.spaces.Dict():
            return [c for key, part in space.items() for c in _components(part, f"{name}.{key}" if name else str(key))]
    raise ValueError(f"action space {leaf!r} is {space}; supported are {SUPPORTED}. Wrap the environment to use one of these")


def _box_components(space: gym.spaces.Box, name: str) -> list[ActionComponent]:
    if not np.issubdtype(space.dtype, np.floating) or not space.is_bounded():
        raise ValueError(
            f"action space {name!r} is {space}; expected a floating Box with finite bounds (gymnasium.wrappers.RescaleAction helps)"
        )
    lows, highs = space.low.reshape(-1), space.high.reshape(-1)
    if (lows == lows[0]).all() and (highs == highs[0]).all():
        return [ActionComponent(name, "continuous", len(lows), float(lows[0]), float(highs[0]))]
    return [ActionComponent(f"{name}_{i}", "continuous", 1, float(a), float(b)) for i, (a, b) in enumerate(zip(lows, highs, strict=True))]


def _flatten(space: gym.Space[Any], action: Any, name: str) -> list[Any]:
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(action, Mapping) or set(action) != set(space.keys()):
            raise ValueError(f"{name}: got {action!r}; expected a dict with the keys {sorted(space.keys())}")
        return [c for key, part in space.items() for c in _flatten(part, action[key], f"{name}.{key}")]
    values = np.asarray(action)
    if values.shape != (space.shape or ()) or (not np.issubdtype(values.dtype, np.number) and values.dtype != bool):
        raise ValueError(f"{name}: got {action!r} of shape {values.shape}; expected numbers of shape {space.shape or ()}")
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return [values - space.start]
    return [values]


def _unflatten(space: gym.Space[Any], row: np.ndarray) -> tuple[Any, int]:
    """The action held by the first columns of ``row``, and how many columns it took."""
    match space:
        case gym.spaces.Dict():
            parts, used = {}, 0
            for key, part in space.items():
                parts[key], count = _unflatten(part, row[used:])
                used += count
            return parts, used
        case gym.spaces.Discrete():
            return space.start + np.int64(row[0]), 1
        case gym.spaces.MultiDiscrete():
            used = int(space.nvec.size)
            return (row[:used].reshape(space.nvec.shape) + space.start).astype(space.dtype), used
        case gym.spaces.MultiBinary():
            used = int(np.prod(space.shape))
            return row[:used].reshape(space.shape).astype(space.dtype), used
        case gym.spaces.Box():
            used = int(np.prod(space.shape))
            # float32 columns of a float64 box can miss the bound by one rounding: stay inside
            return np.clip(row[:used].reshape(space.shape).astype(space.dtype), space.low, space.high), used
    raise AssertionError(space)
