"""Players: what they do, what they may look at, and that they depend on their seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dreamer.envs import PLAYERS, CrafterChop, make_env, make_player
from dreamer.envs.crafter_chop import ACTION_NAMES
from dreamer.envs.planning import shortest_plan
from dreamer.envs.players import NoisyPlayer
from dreamer.types import Player


def play(env: Any, player: Player, seed: int) -> tuple[float, list[int], dict[str, Any]]:
    frame, info = env.reset(seed=seed)
    player.reset(env, seed)
    total, actions, is_over = 0.0, [], False
    while not is_over:
        actions.append(player.act(frame))
        frame, reward, terminated, truncated, info = env.step(actions[-1])
        total, is_over = total + reward, terminated or truncated
    return total, actions, info


def mean_return(name: str, num_episodes: int, **options: Any) -> float:
    env = CrafterChop()
    player = make_player(name, "crafter-chop", **options)
    return float(np.mean([play(env, player, seed)[0] for seed in range(num_episodes)]))


def test_shortest_plan() -> None:
    def successors(state: int) -> Iterator[tuple[int, int]]:
        yield 0, state + 1
        yield 1, state * 2

    assert shortest_plan(3, successors, lambda s: s == 3) == []
    assert shortest_plan(3, successors, lambda s: s == 7) == [1, 0]
    assert shortest_plan(0, lambda s: [(0, (s + 1) % 3)], lambda s: s == 5) is None


def test_scripted_counts_turns_when_it_picks_a_tree() -> None:
    """A tree two tiles ahead needs 1 move + do; one beside the player needs a turn + do: equal. Three ahead loses."""
    env = CrafterChop(camera="arena", border=False)
    env.reset(seed=0)
    for x in range(8):
        for y in range(8):
            env.world[x, y] = "grass"
    assert env.player is not None
    env.world.move(env.player, (4, 3)) if tuple(env.player.pos) != (4, 3) else None
    env.world[4, 7], env.world[3, 3] = "tree", "tree"  # three steps ahead (the player faces down); beside
    player = make_player("scripted", "crafter-chop")
    player.reset(env, 0)
    frame, names = env.render(), []
    for _ in range(7):
        names.append(ACTION_NAMES[player.act(frame)])
        frame, *_ = env.step(ACTION_NAMES.index(names[-1]))
    assert names == ["left", "do", "down", "down", "down", "do", names[6]] and env.world.count("tree") == 0


def test_scripted_takes_every_tree_of_a_small_arena() -> None:
    env = CrafterChop(camera="arena", length=48)
    for seed in range(3):
        total, _, info = play(env, make_player("scripted", "crafter-chop"), seed)
        assert total == 7.0 and info["trees_left"] == 0


def test_players_rank_as_they_should() -> None:
    returns = [
        mean_return("random", 8),
        mean_return("lazy", 8),
        mean_return("noisy", 8, epsilon=0.5),
        mean_return("scripted", 8),
    ]
    assert all(b > a + 1 for a, b in zip(returns, returns[1:], strict=False)), returns


@pytest.mark.parametrize(("name", "options"), [("scripted", {}), ("lazy", {}), ("noisy", {"epsilon": 0.3, "sticky": 2})])
def test_players_react_only_to_what_the_picture_shows(name: str, options: dict[str, Any]) -> None:
    """Felling every tree that is out of sight changes no action."""
    compared = 0
    for seed in range(8):
        runs = []
        for is_changed in (False, True):
            env = CrafterChop(arena=(20, 20))
            frame, _ = env.reset(seed=seed)
            if is_changed:
                x, y = env.view_origin()
                for i in range(env.config.area[0]):
                    for j in range(env.config.area[1]):
                        if env.world[i, j][0] == "tree" and not (x <= i < x + 8 and y <= j < y + 8):
                            env.world[i, j] = "grass"
                            compared += 1
            player = make_player(name, "crafter-chop", **options)
            player.reset(env, seed)
            runs.append((frame, player.act(frame)))
        np.testing.assert_array_equal(runs[0][0], runs[1][0])
        assert runs[0][1] == runs[1][1]
    assert compared > 100


@pytest.mark.parametrize("env_name", list(PLAYERS))
def test_players_depend_on_their_seed_alone(env_name: str) -> None:
    env = make_env(env_name, length=40)
    for name in PLAYERS[env_name]:
        player = make_player(name, env_name)
        first = play(env, player, 1)[1]
        play(env, player, 2)
        assert play(make_env(env_name, length=40), make_player(name, env_name), 1)[1] == first, name
        if name != "scripted":
            frame, _ = env.reset(seed=1)
            player.reset(env, 3)
            assert [player.act(frame) for _ in range(40)] != first


@pytest.mark.parametrize(("epsilon", "sticky"), [(0.0, 1), (0.3, 1), (0.5, 3), (0.5, 8), (1.0, 4)])
def test_epsilon_is_the_share_of_random_actions(epsilon: float, sticky: int) -> None:
    class Expert:
        name = "expert"

        def reset(self, env: Any, seed: int) -> None: ...

        def act(self, frame: np.ndarray) -> int:
            return -1

    env = CrafterChop()
    frame, _ = env.reset(seed=0)
    player = NoisyPlayer(Expert(), epsilon, sticky)
    player.reset(env, 0)
    actions = [player.act(frame) for _ in range(10_000)]
    is_random = np.array(actions) != -1
    assert abs(is_random.mean() - epsilon) < 0.04
    starts = [i for i in range(1, 9_990) if is_random[i] and not is_random[i - 1]]
    assert all(len(set(actions[i : i + sticky])) == 1 for i in starts)


def test_scripted_opens_doors_with_keys() -> None:
    env = make_env("MiniGrid-DoorKey-6x6-v0")
    for seed in range(4):
        total, actions, info = play(env, make_player("scripted", "MiniGrid-DoorKey-6x6-v0"), seed)
        assert info["success"] and total > 0.9 and len(actions) < 40
    noisy = [play(env, make_player("noisy", "minigrid", epsilon=0.4), seed)[2]["success"] for seed in range(4)]
    assert all(noisy)  # recovers, also from doors that it closed by mistake


def test_scripted_walks_around_lava() -> None:
    env = make_env("MiniGrid-LavaCrossingS9N1-v0")
    assert all(play(env, make_player("scripted", "minigrid"), seed)[2]["success"] for seed in range(3))


def test_unknown_players_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="'expert'.*expected one of random, scripted, noisy, lazy"):
        make_player("expert", "crafter-chop")
    with pytest.raises(ValueError, match="'scripted'.*'CartPole-v1'; expected one of random$"):
        make_player("scripted", "CartPole-v1")
    with pytest.raises(ValueError, match="no option 'eps'; expected one of epsilon, sticky"):
        make_player("noisy", "crafter-chop", eps=0.1)
    with pytest.raises(ValueError, match="epsilon is 1.5"):
        make_player("noisy", "crafter-chop", epsilon=1.5)
    with pytest.raises(ValueError, match="sticky is 0"):
        make_player("noisy", "minigrid", sticky=0)
    with pytest.raises(ValueError, match="hesitation is -1"):
        make_player("lazy", "crafter-chop", hesitation=-1.0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("noisy", {"epsilon": "a"}, "player 'noisy': epsilon: .* number.*; got 'a'"),
        ("noisy", {"epsilon": [0.5]}, r"epsilon: .* number; got \[0.5\]"),
        ("noisy", {"sticky": 1.5}, "sticky: .* integer.*; got 1.5"),
        ("lazy", {"wander": None}, "player 'lazy': wander: .* number; got None"),
        ("noisy", {"name": "x"}, "no option 'name'; expected one of epsilon, sticky"),
        ("random", {"env_name": "x"}, "no option 'env_name'; expected one of none"),
    ],
)
def test_options_of_another_type_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make_player(name, "crafter-chop", **options)
    assert "\n" not in str(caught.value)


def test_scripted_players_refuse_other_environments() -> None:
    with pytest.raises(ValueError, match="made for crafter-chop; got DoorKeyEnv"):
        make_player("scripted", "crafter-chop").reset(make_env("minigrid"), 0)
    with pytest.raises(ValueError, match="made for minigrid; got CrafterChop"):
        make_player("scripted", "minigrid").reset(make_env("crafter-chop"), 0)
    with pytest.raises(ValueError, match="pickup.*toggle"):
        make_player("scripted", "minigrid").reset(make_env("minigrid", actions=("left", "right", "forward")), 0)
