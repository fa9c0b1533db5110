"""Minecraft's adapters. The game needs Java 8 and a display, so a stand-in for each package takes its place: the calls, the spaces and
the quirks (frames upside down in memory, a seed that is forgotten, a random picture when the game is lost) are those in the source of
MineRL 0.4.4, MineRL 1.0 and MineStudio 1.1.6. What is said when a package or Java is missing: test_minecraft_missing.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dreamer.data.actions import ActionCodec, env_codec
from dreamer.data.minecraft import minerl_columns
from dreamer.envs import MineRL, MineStudio, make_env
from dreamer.envs.minecraft import MINESTUDIO_LACKS, Minecraft, named_action
from dreamer.envs.players import RandomPlayer
from dreamer.evaluation.agent import PlayerPolicy, evaluate_policy
from dreamer.models import Agent, AgentConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.ops.minecraft import ITEM_ACTIONS, MINERL, MINERL_ITEMS, MINERL_KEYS, VPT, VPT_KEYS, encode_camera
from dreamer.ops.spaces import gym_space
from dreamer.pipeline.collect import check_actions
from dreamer.training.record import record
from dreamer.training.settings import EnvConfig
from dreamer.types import ActionSpace

# What the packages' own specifications hold: id -> (actions beside the camera, size of the pov, time limit).
DOCUMENTED: dict[str, tuple[tuple[str, ...], tuple[int, int], int | None]] = {
    "MineRLTreechop-v0": (MINERL_KEYS, (64, 64), 8000),
    "MineRLNavigate-v0": ((*MINERL_KEYS, "place"), (64, 64), 6000),
    "MineRLObtainDiamond-v0": ((*MINERL_KEYS, *ITEM_ACTIONS), (64, 64), 18000),
    "MineRLBasaltMakeWaterfall-v0": ((*MINERL_KEYS, "use", "equip"), (64, 64), 6000),  # 0.4
    "MineRLBasaltFindCave-v0": (VPT_KEYS, (360, 640), 3600),  # 1.0
    "MineRLHumanSurvival-v0": (VPT_KEYS, (360, 640), None),  # 1.0
    "MineRLTreechopVectorObf-v0": (("vector",), (64, 64), 8000),
}
MINESTUDIO_KEYS = tuple(key for key in VPT_KEYS if key not in ("drop", "swapHands", "ESC"))
FORWARD, ATTACK = 0, 7


class Space:
    """``minerl.herobraine.hero.spaces.Dict``."""

    def __init__(self, names: Iterable[str]) -> None:
        self.spaces = dict.fromkeys([*names, "camera"])

    def no_op(self) -> dict[str, Any]:
        return {name: self._nothing(name) for name in self.spaces}

    @staticmethod
    def _nothing(name: str) -> Any:
        if name == "camera":
            return np.zeros(2, np.float32)
        return "none" if name in ITEM_ACTIONS else 0


class Game:
    """The Gym environment of MineRL: every pixel of a row is the row's number plus that of the tick."""

    def __init__(self, names: tuple[str, ...], shape: tuple[int, int], limit: int | None) -> None:
        self.action_space, self.task, self.unwrapped = Space(names), SimpleNamespace(max_episode_steps=limit), self
        self.said: list[Any] = []
        self.ends_at: int | None = None
        self.lost_at: int | None = None
        self.reset_error: Exception | None = None
        self._memory = np.zeros((*shape, 3), np.uint8)

    def seed(self, seed: int | None) -> None:
        assert isinstance(seed, int) or seed is None  # as MineRL does: a NumPy integer is none
        self.said.append(seed)

    def reset(self) -> dict[str, Any]:
        if self.reset_error:
            raise self.reset_error
        self.said.append("reset")
        self.tick = 0
        return {"pov": self._pov()}

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        assert set(action) <= set(self.action_space.spaces)
        self.said.append(action)
        self.tick += 1
        if self.tick == self.lost_at:
            return (
                {"pov": np.random.default_rng(0).integers(0, 256, self._memory.shape, np.uint8)},
                0,
                True,
                {"error": "Connection timed out!"},
            )
        is_done = self.tick == self.ends_at or self.tick == self.task.max_episode_steps
        return {"pov": self._pov()}, float(action["attack"]), is_done, {}

    def close(self) -> None:
        self.said.append("close")

    def _pov(self) -> np.ndarray:
        rows = np.arange(len(self._memory))[::-1] % 128 + self.tick  # upside down in memory
        self._memory[:] = rows[:, None, None]
        return self._memory[::-1]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    return made


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java8").mkdir()
    file = tmp_path / "java8" / "java"
    file.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def minerl(java: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        """``gym.error.Error``."""

    def make(name: str) -> Game:
        if name not in DOCUMENTED:
            raise Error(f"No registered env with id: {name}")
        return Game(*DOCUMENTED[name])

    registry = SimpleNamespace(all=lambda: [SimpleNamespace(id=name) for name in DOCUMENTED])
    members = {"make": make, "error": SimpleNamespace(Error=Error), "envs": SimpleNamespace(registry=registry)}
    monkeypatch.setitem(sys.modules, "gym", module("gym", **members))
    monkeypatch.setitem(sys.modules, "minerl", module("minerl"))


class Sim:
    """``minestudio.simulator.MinecraftSim``; the game inside is the same as MineRL's."""

    def __init__(self, **given: Any) -> None:
        self.given, self.env = given, Game((*MINESTUDIO_KEYS, "chat", "voxels", "mobs"), (360, 640), None)

    def reset(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image": self.env.reset()["pov"]}, {}

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, reward, is_done, info = self.env.step(action.copy())
        return {"image": observation["pov"]}, reward, is_done, is_done, info

    def close(self) -> None:
        self.env.close()


@pytest.fixture
def minestudio(java: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which MineStudio keeps the game."""
    utils = module("minestudio.utils", get_mine_studio_dir=lambda: str(tmp_path / "MineStudio"))
    callbacks = module("minestudio.simulator.callbacks", RewardsCallback=lambda rewards: ("rewards", rewards))
    for made in (module("minestudio", __path__=[]), utils, module("minestudio.simulator", MinecraftSim=Sim), callbacks):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    libs = tmp_path / "MineStudio" / "engine" / "build" / "libs"
    libs.mkdir(parents=True)
    (libs / "mcprec-6.13.jar").touch()
    return libs


def action(*down: int, camera: int = 60, keys: int = 8) -> dict[str, Any]:
    keyboard = np.zeros(keys, np.int8)
    keyboard[list(down)] = 1
    return {"keyboard": keyboard, "camera": np.int64(camera)}


def game(env: Minecraft) -> Game:
    return env._sim.env if isinstance(env, MineStudio) else env._env  # type: ignore[attr-defined]


# ---- actions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [MINERL, MINERL_ITEMS])
def test_actions_come_back_through_the_readers_conversion(space: ActionSpace) -> None:
    gym = gym_space(space)
    gym.seed(0)
    codec = ActionCodec(gym)
    taken = [gym.sample() for _ in range(300)]
    named = [named_action(space, one) for one in taken]
    recorded = {name: np.array([one[name] for one in named]) for name in named[0]}
    rows, _ = minerl_columns(recorded, "here", item_actions=space is MINERL_ITEMS)
    assert np.array_equal(rows, np.stack([codec.encode(one) for one in taken]))


def test_the_words_of_an_action() -> None:
    named = named_action(VPT, action(FORWARD, VPT_KEYS.index("hotbar.9"), camera=11 * 7 + 2, keys=23))
    assert [name for name, value in named.items() if name != "camera" and value] == ["forward", "hotbar.9"]
    assert set(named) == {*VPT_KEYS, "camera"} and named["camera"].dtype == np.float32
    assert np.allclose(named["camera"], [1.6095, -3.2154], atol=5e-5) and encode_camera(named["camera"]) == 11 * 7 + 2
    items = {name: np.int64(1) for name in ITEM_ACTIONS}
    assert [named_action(MINERL_ITEMS, action() | items)[name] for name in ITEM_ACTIONS] == [
        "dirt",
        "air",
        "torch",
        "wooden_axe",
        "iron_ingot",
    ]


@pytest.mark.parametrize(
    ("name", "options", "space"),
    [
        ("MineRLTreechop-v0", {}, MINERL),
        ("MineRLNavigate-v0", {}, MINERL),
        ("MineRLObtainDiamond-v0", {}, MINERL),
        ("MineRLObtainDiamond-v0", {"actions": "minerl_items"}, MINERL_ITEMS),
        ("MineRLBasaltMakeWaterfall-v0", {}, MINERL),
        ("MineRLBasaltFindCave-v0", {}, VPT),
        ("MineRLBasaltFindCave-v0", {"actions": "minerl"}, MINERL),
        ("minestudio", {}, VPT),
        ("minestudio", {"actions": "minerl"}, MINERL),
    ],
)
def test_environments_speak_the_recordings_actions(minerl: None, minestudio: Path, name: str, options: dict, space: ActionSpace) -> None:
    env = make_env(name, **options)
    assert env_codec(env).space == space  # with its labels: what an agent from recordings has
    frame, _ = env.reset(seed=0)
    assert env.observation_space.contains(frame) and frame.shape == (64, 64, 3) and env.metadata["render_fps"] == 20
    env.step(env.action_space.sample())


def test_what_the_game_is_told(minerl: None) -> None:
    env = MineRL(id="MineRLObtainDiamond-v0")
    env.reset(seed=0)
    _, reward, *_ = env.step(action(ATTACK, camera=61))
    told = game(env).said[-1]
    camera = told.pop("camera")
    assert np.allclose(camera, [0, 0.6154], atol=5e-5) and reward == 1.0
    assert told == {**dict.fromkeys(MINERL_KEYS, 0), "attack": 1, **dict.fromkeys(ITEM_ACTIONS, "none")}
    with pytest.raises(ValueError, match=r"'MineRLObtainDiamond-v0': action is .*; expected one of Dict"):
        env.step(action(camera=121))


def test_what_minestudio_is_told(minestudio: Path) -> None:
    env = MineStudio()
    env.reset(seed=0)
    env.step(action(*range(23), keys=23))  # everything at once
    told = game(env).said[-1]
    assert set(told) == {*MINESTUDIO_KEYS, "camera"}  # no chat, no voxels; what it lacks is left out
    assert set(VPT_KEYS) - set(MINESTUDIO_KEYS) < set(MINESTUDIO_LACKS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MineRLTreechop-v0", {"actions": "vpt"}, "'MineRLTreechop-v0': has no use, drop, .*, only attack, back, .*; choose other actions"),
        ("MineRLNavigate-v0", {"actions": "minerl_items"}, "has no equip, craft, nearbyCraft, nearbySmelt, only"),
        ("MineRLTreechopVectorObf-v0", {}, "has no forward, .*, only camera, vector; choose other actions, or another id"),
        ("MineRLTrechop-v0", {}, "'MineRLTrechop-v0': the installed minerl does not have it; nearest names: MineRLTreechop-v0"),
        ("MineRLHumanSurvival-v0", {}, "'MineRLHumanSurvival-v0': knows no time limit; give length"),
        ("minerl", {"id": "CartPole-v1"}, "'minerl': id: .*got 'CartPole-v1'"),
        ("minerl", {"size": 64}, "'minerl': size: .*got 64"),
        ("minerl", {"size": [64, 0]}, "'minerl': size.1: .*got 0"),
        ("minestudio", {"lenght": 5}, "'minestudio': lenght"),
    ],
)
def test_wrong_options_are_one_line(minerl: None, minestudio: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_env(name, **options)
    assert "\n" not in str(error.value)


# ---- frames, seeds, ends --------------------------------------------------------------------------------------------------------


def test_frames_are_averages_over_areas(minerl: None) -> None:
    env = MineRL(id="MineRLBasaltFindCave-v0", size=(40, 16))
    frame, _ = env.reset(seed=0)
    rows = np.arange(360) % 128
    assert np.array_equal(frame[:, 3, 1], np.round(rows.reshape(40, 9).mean(1))) and (frame == frame[:, :1]).all()
    assert np.array_equal(env.step(action(keys=23))[0], frame + 1)


def test_frames_stay_when_the_game_draws_the_next_one(minerl: None) -> None:
    env = MineRL(id="MineRLTreechop-v0")
    frames = [env.reset(seed=0)[0], *(env.step(action())[0] for _ in range(3))]
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 1, 2, 3] and int(frames[0][63, 0, 0]) == 63
    assert all(frame.flags.owndata and frame.flags.c_contiguous for frame in frames)


@pytest.mark.parametrize("make", [MineRL, MineStudio])
def test_a_seed_is_told_before_every_reset(minerl: None, minestudio: Path, make: Callable[[], Minecraft]) -> None:
    env, again = make(), make()
    for one in (env, again):
        one.reset(seed=7)
        one.reset()
        one.reset()
    first, second, third = game(env).said[::2]
    assert game(env).said[1::2] == ["reset"] * 3 and first == 7 and len({first, second, third}) == 3
    assert game(again).said == game(env).said  # the worlds that follow a seed are its own


def test_ends(minerl: None) -> None:
    env = MineRL(id="MineRLTreechop-v0", length=4)
    for ends_at, expected in ((3, [(False, False)] * 2 + [(True, False)]), (None, [(False, False)] * 3 + [(False, True)])):
        game(env).ends_at = ends_at
        env.reset(seed=0)
        assert [env.step(action())[2:4] for _ in expected] == expected
        with pytest.raises(ValueError, match=r"step\(\) needs a running episode; call reset"):
            env.step(action())


def test_the_environments_own_time_limit_is_no_end_of_the_task(minerl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DOCUMENTED, "MineRLTreechop-v0", (MINERL_KEYS, (64, 64), 2))
    env = MineRL(id="MineRLTreechop-v0", length=5)
    env.reset(seed=0)
    assert [env.step(action())[2:4] for _ in range(2)] == [(False, False), (False, True)]  # where MineRL says done


def test_a_lost_game_gives_no_frame(minerl: None) -> None:
    env = MineRL()
    game(env).lost_at = 2
    env.reset(seed=0)
    env.step(action())
    with pytest.raises(
        ConnectionError, match=r"'MineRLTreechop-v0': the game was lost after 1 ticks \(Connection timed out!\); start again"
    ):
        env.step(action())


def test_a_game_that_does_not_start_says_why_in_one_line(minerl: None) -> None:
    env = MineRL()
    game(env).reset_error = EOFError("a log\nof many lines\n\nMinecraft process finished unexpectedly.")
    with pytest.raises(
        ValueError, match=r"did not start \(EOFError: Minecraft process finished unexpectedly\.\); expected a display"
    ) as error:
        env.reset(seed=0)
    assert "\n" not in str(error.value)
    env.close()
    assert game(env).said[-1] == "close"


# ---- MineStudio's own -----------------------------------------------------------------------------------------------------------


def test_minestudio_is_asked_for_the_frames_as_they_are_drawn(minestudio: Path) -> None:
    env = MineStudio(biome="forest", length=2, rewards=[{"event": "mine_block", "objects": ["oak_log"], "max_times": 3}])
    rewards = [{"event": "mine_block", "identity": "0", "objects": ["oak_log"], "reward": 1.0, "max_reward_times": 3}]
    assert env._sim.given == {
        "action_type": "env",
        "obs_size": (640, 360),
        "render_size": (640, 360),
        "preferred_spawn_biome": "forest",
        "callbacks": [("rewards", rewards)],
    }
    assert MineStudio()._sim.given["callbacks"] == []
    env.reset(seed=0)
    assert [env.step(action(keys=23))[3] for _ in range(2)] == [False, True]


def test_minestudios_missing_game_is_told_before_it_asks(minestudio: Path) -> None:
    next(minestudio.iterdir()).unlink()
    with pytest.raises(ValueError, match=r"'minestudio': no game in .*libs; expected .*: python -m minestudio\.simulator\.entry -y"):
        make_env("minestudio")


# ---- in the pipeline ------------------------------------------------------------------------------------------------------------


def test_episodes_are_recorded_and_evaluated(minerl: None, tmp_path: Path) -> None:
    options = {"id": "MineRLTreechop-v0", "size": [16, 24], "length": 5}
    store = record("minerl", options, [("random", {}, 1.0)], tmp_path / "store", 2, seed=0)
    assert store.action_space == MINERL and store.fps == 20 and store.num_episodes == 2
    episode = store.episode(1)
    assert episode.frames.shape == (6, 3, 16, 24) and not episode.terminals.any()
    assert np.array_equal(episode.rewards[1:], episode.actions[:-1, ATTACK]) and episode.rewards.any()
    result = evaluate_policy(lambda: make_env("minerl", **options), PlayerPolicy(RandomPlayer), num_episodes=2, seed=0, num_envs=2)
    assert result.lengths == (5, 5) and sum(result.returns) > 0


def test_an_agent_acts_where_the_actions_are_those_it_was_trained_with(minerl: None) -> None:
    small = TransformerConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1, time_every=1, context_length=4)
    config = AgentConfig(dynamics=DynamicsConfig(transformer=small), heads=HeadConfig(hidden=8, num_distances=1, num_bins=11))
    agent = Agent(config, action_space=MINERL, token_grid=(2, 2), latent_channels=2)
    check_actions(agent, EnvConfig(name="MineRLTreechop-v0"), Path("phase2"))
    with pytest.raises(ValueError, match=r"actions are keyboard \(binary 8: forward, .*environment .*keyboard \(binary 23: ") as error:
        check_actions(agent, EnvConfig(name="MineRLBasaltFindCave-v0"), Path("phase2"))
    assert len(str(error.value)) < 900  # not every name of the camera's 121 classes


@pytest.mark.parametrize(("name", "expected"), [("MineRLTreechop-v0", MINERL), ("MineRLBasaltFindCave-v0", None)])
def test_the_installed_minerl_has_the_documented_spaces(name: str, expected: ActionSpace | None) -> None:
    pytest.importorskip("minerl", reason="minerl is not installed")
    env = make_env(name)
    space = env_codec(env).space
    env.close()
    assert space in ((MINERL, VPT) if expected is None else (expected,))
