"""Names become environments; unknown ones are told the nearest; wrong options are named."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from dreamer.envs import ENVS, PLAYERS, CrafterChop, GymEnv, MiniGrid, make_env
from dreamer.envs.seeding import episode_seed, player_rng

ROOT = Path(__file__).parents[2]


def test_documented_names_are_all_there_are() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", (ROOT / "docs/extending.md").read_text(), re.M)
    assert [name for name, _ in rows] == list(ENVS)
    for name, players in rows:
        assert ["random", *re.findall(r"`(\w+)`", players)] == list(PLAYERS.get(name, ["random"]))


def test_names_and_ids() -> None:
    assert isinstance(make_env("crafter-chop", camera="arena"), CrafterChop)
    env = make_env("MiniGrid-Empty-5x5-v0")
    assert isinstance(env, MiniGrid) and env.config.id == "MiniGrid-Empty-5x5-v0"
    env = make_env("CartPole-v1", size=32)
    assert isinstance(env, GymEnv) and env.config.size == 32


@pytest.mark.parametrize("name", ["crafter-chop", "minigrid", "CartPole-v1"])
def test_protocol(name: str) -> None:
    env = make_env(name)
    assert isinstance(env, gymnasium.Env)
    frame, info = env.reset(seed=0)
    assert frame.dtype == np.uint8 and frame.shape == (64, 64, 3) and env.observation_space.contains(frame)
    assert isinstance(info, dict)
    frame, reward, terminated, truncated, _ = env.step(0)
    assert frame.shape == (64, 64, 3) and isinstance(reward, float)
    assert terminated is False and truncated is False
    again = make_env(name)
    np.testing.assert_array_equal(again.reset(seed=0)[0], env.reset(seed=0)[0])


@pytest.mark.parametrize(
    ("name", "near"),
    [("crafter-chopp", "crafter-chop"), ("MiniGrid-DorKey-5x5-v0", "MiniGrid-DoorKey-5x5-v0"), ("CartPole", "CartPole-v1")],
)
def test_unknown_name_tells_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError) as error:
        make_env(name)
    assert repr(name) in str(error.value) and near in str(error.value) and "\n" not in str(error.value)


def test_gym_kind_checks_its_id_too() -> None:
    with pytest.raises(ValueError, match="nearest names: .*CartPole-v1"):
        make_env("gym", id="CartPole-v7")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crafter-chop", {"camra": "arena"}, "'crafter-chop': camra"),
        ("crafter-chop", {"tree_fraction": 2.0}, "'crafter-chop': tree_fraction.*got 2.0"),
        ("crafter-chop", {"arena": (1, 1)}, "'crafter-chop': arena"),
        ("minigrid", {"id": "CartPole-v1"}, "'minigrid': id"),
        ("gym", {}, "'gym': id: Field required"),
        ("CartPole-v1", {"kwargs": {"foo": 1}}, "'CartPole-v1': kwargs is {'foo': 1}; expected .*constructor: .*'foo'"),
        ("CartPole-v1", {"kwargs": {"render_mode": "human"}}, "kwargs is .*; expected .*constructor: .*'render_mode'"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_env(name, **options)
    assert "\n" not in str(error.value)


def test_episode_seeds_are_pure_and_apart() -> None:
    recorded = {episode_seed(0, i, "record") for i in range(500)}
    evaluated = {episode_seed(0, i, "evaluate") for i in range(500)}
    others = {episode_seed(1, i, "record") for i in range(500)}
    assert len(recorded | evaluated | others) == 1500
    assert episode_seed(0, 0, "record") == 1982462498  # stores and results that exist depend on it
    assert all(0 <= seed < 2**31 for seed in recorded)
    assert player_rng(7).random() != np.random.default_rng(7).random()
