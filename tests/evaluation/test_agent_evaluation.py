"""Evaluation of policies: every episode once, on seeds that all policies share, and honest intervals."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np
import pytest

from dreamer.envs import make_env, make_player
from dreamer.envs.seeding import episode_seed
from dreamer.evaluation.agent import AgentResult, PlayerPolicy, PolicyPlayer, difference_interval, evaluate_policy


class Countdown(gymnasium.Env):
    """Lasts 1 + seed % 5 steps; the first pixel shows the seed, the second the step; the reward is the action."""

    action_space = gymnasium.spaces.Discrete(10)
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def __init__(self, says_success: bool = False) -> None:
        self.says_success = says_success
        self.num_open = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None
        self.code, self.left, self.step_number = seed % 251, 1 + seed % 5, 0
        return self.frame(), {}

    def frame(self) -> np.ndarray:
        frame = np.zeros((8, 8, 3), np.uint8)
        frame[0, 0], frame[0, 1] = self.code, self.step_number
        return frame

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.left > 0, "stepped after the end"
        self.left -= 1
        self.step_number += 1
        info = {"success": self.code % 2 == 0} if self.says_success else {}
        return self.frame(), float(action), self.left == 0, False, info

    def close(self) -> None:
        self.num_open -= 1


class Scripted:
    """Plays the episode's code modulo 7, remembered from the first frame: proves that ``is_first`` is right."""

    name = "memory"

    def reset(self, num_envs: int, seed: int) -> None:
        self.codes = np.full(num_envs, -1)
        self.batches: list[int] = []

    def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        assert frames.shape[1:] == (3, 8, 8) and frames.dtype == np.uint8
        self.codes = np.where(is_first, frames[:, 0, 0, 0], self.codes)
        assert (frames[is_first, 0, 0, 1] == 0).all()
        self.batches.append(len(frames))
        return (self.codes % 7).astype(np.float32)[:, None]


@pytest.mark.parametrize("num_envs", [1, 3, 50])
def test_every_episode_is_played_once_whatever_the_batch(num_envs: int) -> None:
    envs: list[Countdown] = []

    def make() -> Countdown:
        envs.append(Countdown())
        return envs[-1]

    policy = Scripted()
    result = evaluate_policy(make, policy, num_episodes=20, seed=4, num_envs=num_envs, num_videos=2, success_return=5.0)
    seeds = [episode_seed(4, i, "evaluate") for i in range(20)]
    lengths = [1 + s % 5 for s in seeds]
    assert result.seeds == tuple(seeds) and result.lengths == tuple(lengths)
    assert result.returns == tuple(float(s % 251 % 7 * n) for s, n in zip(seeds, lengths, strict=True))
    assert result.successes == tuple(r >= 5.0 for r in result.returns)
    assert set(policy.batches) == {min(num_envs, 20)}
    assert [len(v) for v in result.videos] == [n + 1 for n in lengths[:2]]
    assert [v[0, 0, 0, 0] for v in result.videos] == [s % 251 for s in seeds[:2]]
    assert all(env.num_open == 0 for env in envs) and len(envs) == min(num_envs, 20)


def test_success_is_what_the_environment_says() -> None:
    result = evaluate_policy(lambda: Countdown(says_success=True), Scripted(), num_episodes=9, seed=0, success_return=-1.0)
    assert result.successes == tuple(s % 251 % 2 == 0 for s in result.seeds)
    assert result.success_rate is not None and result.success_rate.value == np.mean(result.successes)
    result = evaluate_policy(Countdown, Scripted(), num_episodes=2, seed=0)
    assert result.successes == () and result.success_rate is None


def test_bad_input() -> None:
    class Wrong(Scripted):
        def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
            return np.zeros((len(frames), 3), np.float32)

    with pytest.raises(ValueError, match=r"'memory': act gave an array of shape \(2, 3\); expected \(2, 1\)"):
        evaluate_policy(Countdown, Wrong(), num_episodes=2, seed=0)
    with pytest.raises(ValueError, match="num_episodes is 0"):
        evaluate_policy(Countdown, Scripted(), num_episodes=0, seed=0)

    class Outside(Scripted):
        def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
            return np.full((len(frames), 1), 10, np.float32)

    with pytest.raises(ValueError, match="action"):
        evaluate_policy(Countdown, Outside(), num_episodes=2, seed=0)


def play_alone(name: str, seed: int) -> float:
    env, player = make_env("crafter-chop", length=24), make_player(name, "crafter-chop")
    frame, _ = env.reset(seed=seed)
    player.reset(env, seed)
    total, is_over = 0.0, False
    while not is_over:
        frame, reward, _, is_over, _ = env.step(player.act(frame))
        total += float(reward)
    return total


@pytest.mark.parametrize("name", ["random", "scripted"])
def test_players_play_as_they_do_alone(name: str) -> None:
    for num_envs in (1, 3):
        policy = PlayerPolicy(lambda: make_player(name, "crafter-chop"))
        result = evaluate_policy(lambda: make_env("crafter-chop", length=24), policy, num_episodes=5, seed=1, num_envs=num_envs)
        assert result.name == name
        assert result.returns == tuple(play_alone(name, seed) for seed in result.seeds)
    with pytest.raises(ValueError, match="attach"):
        policy.reset(9, 0)


def test_policy_as_a_player() -> None:
    player, env = PolicyPlayer(Scripted()), Countdown()
    for seed in (23, 24):
        frame, _ = env.reset(seed=seed)
        player.reset(env, 0)
        assert [player.act(frame), player.act(frame * 0)] == [seed % 7, seed % 7]  # remembers its first frame


def result(returns: list[float], seed: int = 0) -> AgentResult:
    count = len(returns)
    return AgentResult("x", tuple(returns), (1,) * count, (), tuple(range(seed, seed + count)))


def test_difference_is_paired_only_on_the_same_episodes() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(0, 10, 200)  # easy and hard episodes
    a, b = list(level + 1 + rng.normal(0, 0.1, 200)), list(level)
    paired = difference_interval(result(a), result(b))
    unpaired = difference_interval(result(a), result(b, seed=1000))
    assert paired.low is not None and paired.high is not None and unpaired.low is not None and unpaired.high is not None
    assert 0.97 < paired.low < paired.value < paired.high < 1.03
    assert unpaired.value == pytest.approx(paired.value)
    assert unpaired.low < -0.5 and unpaired.high > 2.5
    assert unpaired.high - unpaired.low == pytest.approx(2 * 1.96 * 10 * np.sqrt(2 / 200), rel=0.15)
    assert difference_interval(result([1.0]), result([0.0], seed=5)).low is None


def test_result_as_json() -> None:
    first = evaluate_policy(Countdown, Scripted(), num_episodes=4, seed=0, success_return=1.0, num_videos=1)
    data = json.loads(json.dumps(first.to_json()))
    assert data["mean_return"]["value"] == np.mean(first.returns) and data["success_rate"]["value"] == np.mean(first.successes)
    assert data["mean_return"]["low"] <= data["mean_return"]["value"] <= data["mean_return"]["high"]
    assert AgentResult.from_json(data) == first
