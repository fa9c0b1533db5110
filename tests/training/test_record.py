"""Recording: reproducible by seed, resumable after an interruption, refused where settings differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer.data.files import locked
from dreamer.data.store import EpisodeStore
from dreamer.envs import make_env, make_player
from dreamer.envs.seeding import episode_seed
from dreamer.evaluation.agent import PolicyPlayer
from dreamer.training.record import PlayerShare, player_schedule, record

OPTIONS = {"length": 9, "camera": "arena"}
PLAYERS: list[PlayerShare] = [("noisy", {"epsilon": 0.5}, 0.5), ("random", {}, 0.25), ("lazy", {}, 0.25)]


def run(out: Path, num_episodes: int = 10, seed: int = 0, **keywords: Any) -> EpisodeStore:
    return record("crafter-chop", OPTIONS, PLAYERS, out, num_episodes, seed, shard_episodes=4, **keywords)


def test_episodes_replay_in_the_environment(tmp_path: Path) -> None:
    store = run(tmp_path / "store")
    assert store.num_episodes == 10 and store.frame_shape == (3, 64, 64) and store.fps == 10
    assert store.action_space.components[0].labels == ("noop", "left", "right", "up", "down", "do")
    assert store.extra["env"] == "crafter-chop" and store.extra["seed"] == 0
    env = make_env("crafter-chop", **OPTIONS)
    total = 0.0
    for index in range(10):
        episode = store.episode(index)
        assert episode.info["seed"] == episode_seed(0, index, "record")
        frame, _ = env.reset(seed=episode.info["seed"])
        np.testing.assert_array_equal(episode.frames[0], frame.transpose(2, 0, 1))
        assert len(episode) == 10 and not episode.terminals.any() and not episode.action_mask[-1]
        for t in range(9):  # the action at frame t leads to frame t + 1 and its reward
            frame, reward, *_ = env.step(int(episode.actions[t, 0]))
            np.testing.assert_array_equal(episode.frames[t + 1], frame.transpose(2, 0, 1))
            assert episode.rewards[t + 1] == reward
        assert episode.info["return"] == episode.rewards.sum()
        total += episode.info["return"]
    assert total > 0
    players = [(info["player"], info["epsilon"]) for info in store.infos[:4]]
    assert sorted(players, key=str) == [("lazy", None), ("noisy-0.5", 0.5), ("noisy-0.5", 0.5), ("random", None)]


def test_same_seed_same_store_other_seed_another(tmp_path: Path) -> None:
    first, second, other = run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", seed=1)
    assert first.fingerprint() == second.fingerprint()
    for index in range(10):
        assert (first.episode(index).frames[0] != other.episode(index).frames[0]).any()


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_goes_on_where_it_was_interrupted(tmp_path: Path, stop_at: int) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        assert total == 10
        if done == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "a", progress=interrupt)
    assert EpisodeStore(tmp_path / "a").num_episodes == stop_at
    seen = []
    resumed = run(tmp_path / "a", progress=lambda done, total: seen.append(done))
    assert seen == list(range(stop_at + 1, 11))
    assert resumed.fingerprint() == run(tmp_path / "b").fingerprint()
    assert [resumed.infos[i] for i in range(10)] == [run(tmp_path / "b").infos[i] for i in range(10)]


def test_more_episodes_extend_a_store_and_fewer_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "a", num_episodes=3)
    assert run(tmp_path / "a", num_episodes=10).fingerprint() == run(tmp_path / "b").fingerprint()
    assert run(tmp_path / "a", num_episodes=2).num_episodes == 10


def test_two_cannot_record_into_one_store(tmp_path: Path) -> None:
    """Both would begin with the same episode: each would be there twice, in training and held out."""
    with locked(tmp_path / "store"), pytest.raises(ValueError, match="store: another process is at work here"):
        run(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]
    assert len(run(tmp_path / "store")) == 10


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    before = run(tmp_path / "a", num_episodes=2).fingerprint()
    with pytest.raises(ValueError, match="extra is"):
        run(tmp_path / "a", seed=1)
    assert EpisodeStore(tmp_path / "a").fingerprint() == before


@pytest.mark.parametrize(
    ("env", "players", "message"),
    [
        ("crafter-chopp", PLAYERS, "nearest names: crafter-chop"),
        ("crafter-chop", [("expert", {}, 1.0)], "unknown player 'expert'"),
        ("crafter-chop", [("noisy", {"eps": 1}, 1.0)], "no option 'eps'"),
        ("crafter-chop", [("random", {}, 0.5)], "sum to 1"),
        ("crafter-chop", [("random", {}, 1.5), ("lazy", {}, -0.5)], "positive"),
        ("crafter-chop", [], "fractions"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, env: str, players: list[PlayerShare], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(env, {}, players, tmp_path / "a", 2, 0)
    assert not (tmp_path / "a").exists()


def test_schedule_keeps_the_shares_from_the_start() -> None:
    for fractions in ([0.5, 0.25, 0.25], [0.1, 0.9], [1.0], [1 / 3, 1 / 3, 1 / 3]):
        schedule = player_schedule(fractions, 400)
        assert schedule[:100] == player_schedule(fractions, 100)
        for n in (4, 37, 400):
            counts = np.bincount(schedule[:n], minlength=len(fractions))
            assert (np.abs(counts - n * np.array(fractions)) <= 1).all()


def test_terminated_episodes_and_trained_policies_are_recorded(tmp_path: Path) -> None:
    class Forward:
        name = "trained"

        def reset(self, num_envs: int, seed: int) -> None:
            self.actions = [2, 2, 1, 2, 2]

        def act(self, frames: np.ndarray, is_first: np.ndarray) -> np.ndarray:
            return np.array([[self.actions.pop(0)]], np.float32)

    def maker(name: str, env_name: str, **options: Any) -> Any:
        return PolicyPlayer(Forward()) if name == "agent" else make_player(name, env_name, **options)

    store = record("MiniGrid-Empty-5x5-v0", {}, [("agent", {}, 1.0)], tmp_path / "a", 2, 0, player_maker=maker)
    episode = store.episode(1)
    assert len(episode) == 6 and episode.info["player"] == "trained"
    assert episode.terminals.tolist() == [False] * 5 + [True] and episode.rewards[-1] > 0.9
