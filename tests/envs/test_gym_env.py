"""Any Gymnasium environment with pixels, at one size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from dreamer.envs import make_env, make_player
from dreamer.envs.gym_env import GymEnv, resize
from dreamer.evaluation.agent import PlayerPolicy, evaluate_policy
from dreamer.training.record import record


class Pictures(gymnasium.Env):
    """Observes or renders a fixed picture; the observation is brighter than the rendering."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, shape: tuple[int, ...], has_pixels: bool, dtype: str = "uint8", render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._picture = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        self._has_pixels = has_pixels
        self.observation_space = (
            gymnasium.spaces.Box(0, 255, shape, np.uint8) if has_pixels else gymnasium.spaces.Box(-1, 1, (4,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return (self._picture + 1 if self._has_pixels else np.zeros(4, np.float32)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return *self.reset()[:1], 1.0, False, False, {}

    def render(self) -> Any:
        return self._picture


class OneBuffer(Pictures):
    """Draws every frame into the same memory: all its pixels are the number of the step."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._picture[:] = 0
        return self._observed(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._picture += 1
        return self._observed(), 1.0, False, False, {}

    def _observed(self) -> Any:
        return self._picture if self._has_pixels else np.zeros(4, np.float32)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("Pictures-v0", entry_point=Pictures)
    gymnasium.register("OneBuffer-v0", entry_point=OneBuffer)
    yield
    del gymnasium.registry["Pictures-v0"], gymnasium.registry["OneBuffer-v0"]


def test_takes_the_observation_where_it_is_a_picture_else_the_rendering() -> None:
    shape = (4, 4, 3)
    picture = np.arange(48).reshape(shape)
    for has_pixels, offset in ((True, 1), (False, 0)):
        env = GymEnv(id="Pictures-v0", size=8, kwargs={"shape": shape, "has_pixels": has_pixels})
        frame, _ = env.reset(seed=0)
        assert frame.shape == (8, 8, 3) and frame.dtype == np.uint8 and env.metadata["render_fps"] == 7
        np.testing.assert_array_equal(frame[::2, ::2], picture + offset)
        np.testing.assert_array_equal(env.step(0)[0], frame)


def test_length_limits_the_episode() -> None:
    env = GymEnv(id="Pictures-v0", size=8, length=3, kwargs={"shape": (8, 8, 3), "has_pixels": True})
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("has_pixels", [True, False])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8)])
def test_frames_stay_when_the_environment_draws_the_next_one(tmp_path: Path, has_pixels: bool, shape: tuple[int, ...]) -> None:
    options = {"size": 8, "length": 4, "kwargs": {"shape": shape, "has_pixels": has_pixels}}
    episode = record("OneBuffer-v0", options, [("random", {}, 1.0)], tmp_path, 1, 0).episode(0)
    assert [np.unique(frame).tolist() for frame in episode.frames] == [[0], [1], [2], [3], [4]]
    policy = PlayerPolicy(lambda: make_player("random", "OneBuffer-v0"))
    (video,) = evaluate_policy(lambda: make_env("OneBuffer-v0", **options), policy, num_episodes=1, seed=0, num_videos=1).videos
    assert [np.unique(frame).tolist() for frame in video] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(("shape", "dtype"), [((4, 4, 5), "uint8"), ((4, 4, 3), "float32"), ((48,), "uint8")])
def test_renderings_that_are_no_pictures_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    env = GymEnv(id="Pictures-v0", size=8, kwargs={"shape": shape, "has_pixels": False, "dtype": dtype})
    with pytest.raises(ValueError, match="Pictures-v0.*expected a uint8 picture"):
        env.reset(seed=0)


def test_resize() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 200
    image[0, 0] = 0
    assert resize(image, 2, "area").tolist() == [[[150] * 3, [0] * 3], [[0] * 3, [0] * 3]]
    assert set(np.unique(resize(image, 9, "nearest"))) == {0, 200}
    np.testing.assert_array_equal(resize(image, 4, "area"), image)
    grey = image[..., 0]
    np.testing.assert_array_equal(resize(grey, 4, "area"), image)
    np.testing.assert_array_equal(resize(grey[..., None], 4, "area"), image)
