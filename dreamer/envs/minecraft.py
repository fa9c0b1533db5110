"""Minecraft through MineRL 0.4, MineRL 1.0 or MineStudio, with the actions and frames that recordings of Minecraft have.

The packages are not installed with this one: each runs the game in a Java 8 beside Python. What their environments take and give is
as the source of these versions and their documentation say:

===================  =======================================================================================================
MineRL 0.4.4         old Gym: ``seed``, ``obs = reset()``, ``obs, reward, done, info = step(action)``. ``obs["pov"]`` 64x64
(Minecraft 1.11)     (uint8, H, W, 3). Actions: eight keys (0 or 1) and ``camera``, (pitch, yaw) degrees a tick, within 180;
                     Navigate adds the item list ``place``, Obtain five of them, BASALT ``use`` and ``equip``.
MineRL 1.0           the same calls. ``obs["pov"]`` 640x360. BASALT and Obtain have the 23 keys of VPT and ``camera``; ``ESC``
(Minecraft 1.16)     ends an episode of BASALT. Treechop and Navigate have what they had.
MineStudio 1.1       Gymnasium's ``step``, but ``reset()`` takes no seed: that of the game inside (``sim.env``) does. ``image`` of
(Minecraft 1.16)     ``obs_size``. Actions in the words of MineRL 1.0, without ``drop``, ``swapHands``, ``ESC``.
===================  =======================================================================================================

All of them play at 20 ticks a second, and a seed fixes the world, though not what its animals do in it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import shutil
import subprocess
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field

from dreamer.ops.minecraft import ACTION_SPACES, VPT_KEYS, decode_camera
from dreamer.ops.spaces import gym_space
from dreamer.types import ActionSpace, Config

INSTALL = {
    "minerl": "pip install minerl==0.4.4, or pip install git+https://github.com/minerllabs/minerl for MineRL 1.0",
    "minestudio": "pip install 'minestudio>=1.1.6'",
}
INSTALL_JAVA = "conda install -c conda-forge openjdk=8, or apt-get install openjdk-8-jdk"
MINESTUDIO_LACKS = ("drop", "swapHands", "pickItem", "ESC")  # pickItem: in its source, not in its documentation

Frame = UInt8[np.ndarray, "H W 3"]
Side = Annotated[int, Field(ge=8, le=4096)]  # pixels


class MinecraftConfig(Config):
    size: tuple[Side, Side] = (64, 64)  # height, width of the frames: those of the recordings that the agent learned from


class MineRLConfig(MinecraftConfig):
    id: str = Field("MineRLTreechop-v0", pattern="^MineRL[^:]*$")  # Gym would import the module before a colon
    actions: Literal["minerl", "minerl_items", "vpt"] | None = None  # as in the recordings; None: vpt where there are its keys, or minerl
    length: int | None = Field(None, ge=1)  # time limit in ticks; None: the environment's own


class MineStudioReward(Config):
    event: str  # mine_block, craft_item, kill_entity, ...: a group of the game's statistics
    objects: tuple[str, ...] = Field(min_length=1)  # what counts, such as oak_log
    reward: float = 1.0  # for each time
    max_times: int = Field(64, ge=1)  # in an episode


class MineStudioConfig(MinecraftConfig):
    actions: Literal["minerl", "vpt"] = "vpt"  # as in the recordings
    length: int = Field(6000, ge=1)  # time limit in ticks: five minutes; the game itself knows none
    biome: str | None = None  # where to begin, such as forest; None: anywhere
    rewards: tuple[MineStudioReward, ...] = ()  # none: the reward stays 0


class Minecraft(gymnasium.Env):
    """What the adapters share. They give ``_begin`` and ``_tick``, which speak the package's own words."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (Gymnasium's class attribute)

    def __init__(self, where: str, size: tuple[int, int], space: ActionSpace, known: Collection[str], length: int) -> None:
        self.render_mode = "rgb_array"
        self.observation_space = gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8)
        self.action_space = gym_space(space)
        self.action_names = {component.name: component.labels for component in space.components}
        self._where, self._size, self._space, self._known, self._length = where, size, space, known, length
        self._num_steps, self._is_running = 0, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        """Starts the game if it does not run (minutes), then a world of this seed. Raises ``ValueError`` if it does not start."""
        super().reset(seed=seed, options=options)
        world = int(self.np_random.integers(2**31)) if seed is None else seed
        try:
            pov = self._begin(world)
        except (EOFError, OSError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{self._where}: Minecraft did not start ({_words(error)}); expected a display (try: xvfb-run -a dreamer ...) and Java 8"
            ) from error
        self._num_steps, self._is_running = 0, True
        return self._frame(pov), {}

    def step(self, action: Mapping[str, Any]) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """One tick of 50 ms. Raises ``ConnectionError`` if the game is lost: the packages would go on with a random picture."""
        if not self._is_running:
            raise ValueError(f"{self._where}: step() needs a running episode; call reset() first")
        if not self.action_space.contains(action):
            raise ValueError(f"{self._where}: action is {action!r}; expected one of {self.action_space}")
        named = {name: value for name, value in named_action(self._space, action).items() if name in self._known}
        pov, reward, is_done, info = self._tick(named)
        if "error" in info:
            self._is_running = False
            raise ConnectionError(f"{self._where}: the game was lost after {self._num_steps} ticks ({info['error']}); start again")
        self._num_steps += 1
        is_late = self._num_steps >= self._length  # the packages call this done as well
        self._is_running = not (is_done or is_late)
        return self._frame(pov), reward, is_done and not is_late, is_late, info

    def _frame(self, pov: UInt8[np.ndarray, "H2 W2 3"]) -> Frame:
        if pov.shape[:2] == self._size:
            return pov.copy()  # MineRL gives a view, upside down in memory
        height, width = self._size
        return np.array(Image.fromarray(np.ascontiguousarray(pov)).resize((width, height), Image.Resampling.BOX))

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H2 W2 3"]:
        raise NotImplementedError

    def _tick(self, named: dict[str, Any]) -> tuple[UInt8[np.ndarray, "H2 W2 3"], float, bool, dict[str, Any]]:
        raise NotImplementedError


class MineRL(Minecraft):
    """Options are the fields of :class:`MineRLConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = MineRLConfig(**options)
        where = f"env {self.config.id!r}"
        gym, _ = load_package(where, "minerl", "gym", "minerl")
        try:
            self._env = gym.make(self.config.id)
        except gym.error.Error as error:
            near = difflib.get_close_matches(self.config.id, [spec.id for spec in gym.envs.registry.all()], n=3, cutoff=0.3)
            raise ValueError(f"{where}: the installed minerl does not have it; nearest names: {', '.join(near) or 'none'}") from error
        names = self._env.action_space.spaces
        if not hasattr(self._env.action_space, "no_op"):
            raise ValueError(f"{where}: the installed minerl is older than 0.4; expected {INSTALL['minerl']}")
        space = ACTION_SPACES[self.config.actions or ("vpt" if set(VPT_KEYS) <= set(names) else "minerl")]
        check_names(where, space, names)
        own = self._env.unwrapped.task.max_episode_steps
        limits = [limit for limit in (self.config.length, own) if limit is not None]
        if not limits:
            raise ValueError(f"{where}: knows no time limit; give length, in ticks of 50 ms")
        super().__init__(where, self.config.size, space, names, min(limits))

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H2 W2 3"]:
        self._env.seed(seed)
        return self._env.reset()["pov"]

    def _tick(self, named: dict[str, Any]) -> tuple[UInt8[np.ndarray, "H2 W2 3"], float, bool, dict[str, Any]]:
        observation, reward, is_done, info = self._env.step({**self._env.action_space.no_op(), **named})
        return observation["pov"], float(reward), bool(is_done), info

    def close(self) -> None:
        self._env.close()


class MineStudio(Minecraft):
    """Options are the fields of :class:`MineStudioConfig`. The keys in ``MINESTUDIO_LACKS`` do nothing here."""

    def __init__(self, **options: Any) -> None:
        self.config = config = MineStudioConfig(**options)
        where = "env 'minestudio'"
        modules = ("minestudio.utils", "minestudio.simulator", "minestudio.simulator.callbacks")
        utils, simulator, callbacks = load_package(where, "minestudio", *modules)
        engine = Path(utils.get_mine_studio_dir(), "engine", "build", "libs")
        if not any(engine.glob("*.jar")):  # MineStudio would ask on the terminal, and end the process
            raise ValueError(f"{where}: no game in {engine}; expected what this downloads: python -m minestudio.simulator.entry -y")
        rewards = [
            {"event": r.event, "identity": str(i), "objects": list(r.objects), "reward": r.reward, "max_reward_times": r.max_times}
            for i, r in enumerate(config.rewards)
        ]
        # "env": MineRL's words. obs_size is that of the rendering: scaled once, by us. The list is new: its default is shared.
        self._sim = simulator.MinecraftSim(
            action_type="env",
            obs_size=(640, 360),
            render_size=(640, 360),
            preferred_spawn_biome=config.biome,
            callbacks=[callbacks.RewardsCallback(rewards)] if rewards else [],
        )
        space, names = ACTION_SPACES[config.actions], self._sim.env.action_space.spaces
        check_names(where, space, {*names, *MINESTUDIO_LACKS})
        super().__init__(where, config.size, space, names, config.length)

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H2 W2 3"]:
        self._sim.env.seed(seed)
        return self._sim.reset()[0]["image"]

    def _tick(self, named: dict[str, Any]) -> tuple[UInt8[np.ndarray, "H2 W2 3"], float, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._sim.step(named)
        return observation["image"], float(reward), bool(terminated or truncated), info

    def close(self) -> None:
        self._sim.close()


def named_action(space: ActionSpace, action: Mapping[str, Any]) -> dict[str, Any]:
    """An action of ``gym_space(space)`` in the words of MineRL and MineStudio: every key 0 or 1, the camera's (pitch, yaw) in degrees,
    the middle of its class, every item by its name. ``dreamer.data.minecraft.minerl_columns`` is the way back."""
    keyboard, camera, *items = space.components
    named: dict[str, Any] = {key: int(is_down) for key, is_down in zip(keyboard.labels, action[keyboard.name], strict=True)}
    named[camera.name] = decode_camera(np.asarray(action[camera.name])).astype(np.float32)
    return named | {item.name: item.labels[int(action[item.name])] for item in items}


def check_names(where: str, space: ActionSpace, names: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``names``, the actions that an environment has, hold every key and every item list of ``space``."""
    keyboard, *others = space.components
    if lacking := [name for name in (*keyboard.labels, *(c.name for c in others)) if name not in names]:
        raise ValueError(f"{where}: has no {', '.join(lacking)}, only {', '.join(sorted(names))}; choose other actions, or another id")


def load_package(where: str, package: str, *modules: str) -> list[ModuleType]:
    """Import the modules of a package that runs Minecraft. Raises ``ValueError``, in one line, if the package or Java 8 is missing, or
    if it cannot be imported: it comes from a time of older Gym and NumPy."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{where}: the package {package!r} is not installed; expected it and Java 8: {INSTALL[package]}; {INSTALL_JAVA}")
    check_java(where)
    try:
        return [importlib.import_module(module) for module in modules]
    except Exception as error:  # of any kind: whatever its dependencies raise
        raise ValueError(f"{where}: {package!r} cannot be imported ({_words(error)}); try again with {INSTALL[package]}") from error


def check_java(where: str) -> None:
    """Raise ``ValueError`` unless the first ``java`` on the PATH, which the packages call, is a Java 8: they do not run on later ones."""
    java = shutil.which("java")
    if java is None:
        raise ValueError(f"{where}: there is no java on the PATH; expected Java 8: {INSTALL_JAVA}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    version = re.search(r'version "([^"]+)"', said.stderr + said.stdout)
    if version is None or not version[1].startswith("1.8."):
        got = f"Java {version[1]}" if version else "of no version that it tells"
        raise ValueError(f"{where}: {java} is {got}; expected Java 8 (1.8) first on the PATH: {INSTALL_JAVA}")


def _words(error: BaseException) -> str:
    """The last line of an error, the one that says what happened."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__, 200)
