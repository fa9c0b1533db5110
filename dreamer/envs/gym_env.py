"""Any Gymnasium environment that shows pictures, by its id, at one fixed size."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any, Literal

import gymnasium
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from dreamer.types import Config

_REGISTRANTS = ("minigrid", "ale_py")  # packages that register environments when they are imported


class GymConfig(Config):
    id: str
    size: int = Field(64, ge=8)  # pixels, of both sides; the picture is stretched to a square
    length: int | None = Field(None, ge=1)  # time limit in steps; None: the environment's own
    resample: Literal["area", "nearest"] = "area"  # nearest keeps pixel art sharp
    kwargs: dict[str, Any] = Field(default_factory=dict)  # for the environment's constructor


class GymEnv(gymnasium.Wrapper):
    """Options are the fields of :class:`GymConfig`. The observation is the environment's own where that is a uint8
    picture, else what it renders."""

    def __init__(self, **options: Any) -> None:
        self.config = GymConfig(**options)
        check_gym_id(self.config.id)
        limit = {} if self.config.length is None else {"max_episode_steps": self.config.length}
        try:
            env = gymnasium.make(self.config.id, render_mode="rgb_array", disable_env_checker=True, **limit, **self.config.kwargs)
        except TypeError as error:
            got, why = self.config.kwargs, " ".join(str(error).split())
            raise ValueError(
                f"env {self.config.id!r}: kwargs is {got}; expected arguments of the environment's constructor: {why}"
            ) from error
        super().__init__(env)
        space = self.env.observation_space
        self._has_pixels = isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8 and is_picture(space.shape)
        size = self.config.size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._picture(observation), info

    def step(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._picture(observation), float(reward), bool(terminated), bool(truncated), info

    def _picture(self, observation: Any) -> UInt8[np.ndarray, "H W 3"]:
        image = observation if self._has_pixels else self.env.render()
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not is_picture(image.shape):
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"env {self.config.id!r}: rendering gave {got}; expected a uint8 picture (H, W, 3)")
        return resize(image, self.config.size, self.config.resample)


def is_picture(shape: tuple[int, ...]) -> bool:
    """(H, W), (H, W, 1) or (H, W, 3)."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))


def resize(image: UInt8[np.ndarray, "H W *C"], size: int, resample: Literal["area", "nearest"]) -> UInt8[np.ndarray, "size size 3"]:
    """Stretch a grey or RGB picture to ``size`` x ``size`` RGB."""
    image = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))
    if image.shape[:2] == (size, size):
        return image.copy()  # environments may draw the next frame in the same memory
    how = Image.Resampling.BOX if resample == "area" else Image.Resampling.NEAREST
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), how))


def check_gym_id(name: str, others: tuple[str, ...] = ()) -> None:
    """Raise ``ValueError`` with the nearest names (also of ``others``) unless Gymnasium knows the id ``name``."""
    if name in gymnasium.registry:
        return
    for package in _REGISTRANTS:
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    if name in gymnasium.registry:
        return
    near = difflib.get_close_matches(name, [*others, *gymnasium.registry], n=3, cutoff=0.3)
    raise ValueError(
        f"unknown environment {name!r}; nearest names: {', '.join(near) or 'none'}; expected {', '.join(others)}"
        f"{' or ' if others else ''}an id in Gymnasium's registry (is the package that registers it installed?)"
    )
