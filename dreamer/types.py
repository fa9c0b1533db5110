"""The nouns that every room shares. This file imports no other room.

Shape letters: B batch, F frames, T latent steps, P frames (and actions) per latent step, C H W pixels, N tokens per latent
step, Z latent channels, A action columns, D width, R rollout horizon.

Time contract (``data/alignment.py`` is the only place that shifts time):

=================  =============================================================================================
``frames[t]``      observation t
``actions[t]``     action taken **at** frame t; its effect is in frame t + 1 (the policy's target at t)
``prev_actions[t]``  ``actions[t - 1]``: what led into frame t (the dynamics' input at t); none at an episode's start
``rewards[t]``     reward that arrived **with** frame t, caused by ``actions[t - 1]``; ``rewards[0] == 0``
``terminals[t]``   True if frame t is the last of an episode that ended by itself, not by a time limit
=================  =============================================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import BaseModel, ConfigDict
from torch import Tensor

ActionKind = Literal["categorical", "binary", "continuous"]


class Config(BaseModel):
    """Base of every config class: unknown keys and wrong types are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, protected_namespaces=())


@dataclass(frozen=True)
class ActionComponent:
    """One part of an action.

    ``categorical``: one column that holds an index in [0, size). ``binary``: ``size`` columns of 0 or 1, independent of
    each other. ``continuous``: ``size`` columns, each in [low, high].
    """

    name: str
    kind: ActionKind
    size: int
    low: float = -1.0
    high: float = 1.0
    labels: tuple[str, ...] = ()  # names of the categories or of the columns, for people

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "binary", "continuous"):
            raise ValueError(f"action component {self.name!r}: kind is {self.kind!r}; expected categorical, binary or continuous")
        if self.size < 1:
            raise ValueError(f"action component {self.name!r}: size is {self.size}; expected at least 1")
        if self.kind == "continuous" and not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"action component {self.name!r}: low is {self.low}, high {self.high}; expected finite bounds, low below high")
        if self.labels and len(self.labels) != self.size:
            raise ValueError(f"action component {self.name!r}: {len(self.labels)} labels for size {self.size}")

    @property
    def num_columns(self) -> int:
        return 1 if self.kind == "categorical" else self.size


@dataclass(frozen=True)
class ActionSpace:
    """The components of an action, side by side in the columns of one float32 array ``(..., A)``."""

    components: tuple[ActionComponent, ...]

    def __post_init__(self) -> None:
        names = [c.name for c in self.components]
        if not names:
            raise ValueError("an action space needs at least one component")
        if len(set(names)) != len(names):
            raise ValueError(f"action components share a name: {names}")

    @property
    def num_columns(self) -> int:
        return sum(c.num_columns for c in self.components)

    def slices(self) -> Iterator[tuple[ActionComponent, slice]]:
        """Each component with the columns that it fills."""
        start = 0
        for component in self.components:
            yield component, slice(start, start + component.num_columns)
            start += component.num_columns

    def validate(self, actions: np.ndarray, where: str) -> None:
        """Raise ``ValueError`` naming ``where`` unless every row of ``actions (..., A)`` lies in this space."""
        if actions.shape[-1] != self.num_columns:
            raise ValueError(f"{where}: {actions.shape[-1]} action columns; this action space has {self.num_columns}")
        for component, columns in self.slices():
            values = actions[..., columns]
            if not np.isfinite(values).all():
                raise ValueError(f"{where}: action {component.name!r} holds NaN or infinity")
            if component.kind == "continuous":
                low, high = component.low, component.high
            else:
                low, high = 0, component.size - 1 if component.kind == "categorical" else 1
                if not (values == np.round(values)).all():
                    raise ValueError(f"{where}: action {component.name!r} holds values that are not whole numbers")
            if values.size and (values.min() < low or values.max() > high):
                raise ValueError(
                    f"{where}: action {component.name!r} has values in [{values.min():g}, {values.max():g}]; expected [{low:g}, {high:g}]"
                )

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(c) | {"labels": list(c.labels)} for c in self.components]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> ActionSpace:
        """Raises ``ValueError``, ``TypeError`` or ``AttributeError`` for what ``to_json`` cannot have given."""
        components = tuple(ActionComponent(**{**c, "labels": tuple(c.get("labels", ()))}) for c in data)
        for c in components:  # the class itself trusts its caller's types
            is_text = all(isinstance(text, str) for text in (c.name, *c.labels))
            if not is_text or type(c.size) is not int or c.size >= 1 << 31 or not {type(c.low), type(c.high)} <= {int, float}:
                raise TypeError(f"action component {str(c)[:200]}")
        return cls(components)


@dataclass(frozen=True)
class Episode:
    """One recording, in the time contract above. ``action_mask[t]`` is False where the action at t is not known."""

    frames: UInt8[np.ndarray, "F C H W"]
    actions: Float[np.ndarray, "F A"]
    action_mask: Bool[np.ndarray, " F"]
    rewards: Float[np.ndarray, " F"]
    terminals: Bool[np.ndarray, " F"]
    task: int = 0
    info: dict[str, Any] = field(default_factory=dict)  # JSON values: player, seed, source file, ...
    has_rewards: bool = True  # False: nobody knows the rewards, which read 0, nor the end; no head learns from them

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Batch:
    """Windows of latent steps, ready for the models."""

    latents: Float[Tensor, "B T N Z"]
    prev_actions: Float[Tensor, "B T P A"]
    prev_action_mask: Bool[Tensor, "B T P"]
    actions: Float[Tensor, "B T P A"]
    action_mask: Bool[Tensor, "B T P"]
    rewards: Float[Tensor, "B T"]
    terminals: Bool[Tensor, "B T"]
    task: Int[Tensor, " B"]
    has_rewards: Bool[Tensor, " B"]  # False: rewards and terminals are not known
    is_relevant: Bool[Tensor, " B"]  # drawn from the episodes that reach the task: behaviour cloning learns from these

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)})

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The same batch with fewer rows."""
        return Batch(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class FrameBatch:
    """Windows of raw frames for tokenizer training."""

    frames: UInt8[Tensor, "B F C H W"]

    def __len__(self) -> int:
        return len(self.frames)

    def to(self, device: torch.device | str) -> FrameBatch:
        return FrameBatch(self.frames.to(device, non_blocking=True))


@dataclass(frozen=True)
class Trajectory:
    """Imagined rollouts. Index t of ``features`` is a state; ``actions[:, t]`` was sampled there; ``rewards[:, t]`` and
    ``continues[:, t]`` belong to the state after it (r_{t+1}, c_{t+1})."""

    features: Float[Tensor, "B R1 D"]  # R + 1 states: the agent token's outputs
    actions: Float[Tensor, "B R P A"]
    rewards: Float[Tensor, "B R"]
    continues: Float[Tensor, "B R"]  # probability that the episode goes on
    latents: Float[Tensor, "B R1 N Z"]
    has_ended: Bool[Tensor, " B"]  # the episode was over at s_0: nothing that follows counts


@runtime_checkable
class Tokenizer(Protocol):
    """Frames to latents and back. ``encode`` returns latents normalised to about zero mean and unit variance."""

    temporal_stride: int  # frames per latent step after the first (P)
    token_grid: tuple[int, int]  # rows, columns; N = rows * columns
    latent_channels: int  # Z
    frame_shape: tuple[int, int, int]  # C, H, W
    can_decode: bool
    can_stream: bool

    def encode(self, frames: UInt8[Tensor, "B F C H W"]) -> Float[Tensor, "B T N Z"]: ...

    def decode(self, latents: Float[Tensor, "B T N Z"]) -> UInt8[Tensor, "B F C H W"]: ...

    def fingerprint(self) -> str:
        """Hash of weights and settings: latents made by another tokenizer are refused."""
        ...


@runtime_checkable
class Env(Protocol):
    """A Gymnasium environment whose observation is a uint8 image (H, W, 3)."""

    observation_space: Any
    action_space: Any

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


@runtime_checkable
class Player(Protocol):
    """Who acts in an environment while it is recorded: ``reset`` at an episode's start, then one action per frame."""

    name: str

    def reset(self, env: Env, seed: int) -> None: ...

    def act(self, frame: np.ndarray) -> Any: ...


@runtime_checkable
class Reader(Protocol):
    """Reads one recording format. ``find`` lists the recordings below a path, ``read`` returns one of them."""

    name: str
    action_space: ActionSpace
    frames_per_second: float

    def find(self, path: Path) -> list[Path]: ...

    def read(self, recording: Path) -> Episode: ...
