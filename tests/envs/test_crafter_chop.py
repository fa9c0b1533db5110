"""Crafter Chop: the rules, the picture, and that an episode depends on its seed alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from crafter import constants, engine

from dreamer.envs.crafter_chop import ACTION_NAMES, GRASS, OUTSIDE, TREE, WATER, CrafterChop

NOOP, LEFT, RIGHT, UP, DOWN, DO = range(6)
CONFIGS: list[dict[str, Any]] = [
    {"camera": "player"},
    {"camera": "player", "border": False, "arena": (5, 4)},  # sees beyond the world's edge
    {"camera": "player", "view": (4, 8), "arena": (7, 9), "size": 32},  # tiles that are not square
    {"camera": "arena"},
    {"camera": "arena", "border": False},
    {"camera": "arena", "arena": (3, 4), "tree_fraction": 0.5},  # smaller than the view
]
TEXTURES = engine.Textures(constants.root / "assets")


def crafter_picture(env: CrafterChop) -> np.ndarray:
    """What crafter.engine.LocalView draws of the same world."""
    view, size = env.config.view, env.config.size
    center = np.add(env.view_origin(), np.array(view) // 2)
    camera: Any = SimpleNamespace(pos=center, sleeping=False)
    local_view = engine.LocalView(env.world, TEXTURES, view)
    return local_view(camera, np.array([size // view[0], size // view[1]])).astype(np.uint8).transpose(1, 0, 2)


def place(env: CrafterChop, tree_offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Clear the arena but for trees at these offsets from the player, who goes to the interior's middle."""
    (border_x, border_y), (width, height) = env.config.border_width, env.config.interior
    for x in range(width):
        for y in range(height):
            env.world[x + border_x, y + border_y] = "grass"
    middle = (border_x + width // 2, border_y + height // 2)
    assert env.player is not None
    if tuple(env.player.pos) != middle:
        env.world.move(env.player, middle)
    for dx, dy in tree_offsets:
        env.world[middle[0] + dx, middle[1] + dy] = "tree"
    return middle


@pytest.mark.parametrize("config", CONFIGS)
def test_picture_equals_crafters_own(config: dict[str, Any]) -> None:
    env = CrafterChop(**config)
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(2):
        frame, _ = env.reset(seed=seed)
        for action in rng.integers(0, 6, 16):
            np.testing.assert_array_equal(frame, crafter_picture(env))
            assert env.player is not None
            seen.add(env.player.texture)
            frame = env.step(int(action))[0]
        assert frame.dtype == np.uint8 and frame.shape == env.observation_space.shape
    assert len(seen) == 4  # every facing was compared


def test_frames_are_not_overwritten_by_later_steps() -> None:
    env = CrafterChop()
    first, _ = env.reset(seed=0)
    kept = first.copy()
    for action in (LEFT, DOWN, DO, RIGHT):
        env.step(action)
    np.testing.assert_array_equal(first, kept)


def test_moves_turn_walk_and_stop_at_trees() -> None:
    env = CrafterChop()
    env.reset(seed=0)
    x, y = place(env, [(1, 0)])
    assert env.player is not None
    env.step(RIGHT)
    assert tuple(env.player.pos) == (x, y) and tuple(env.player.facing) == (1, 0)  # a tree stands there: only turns
    for action, position in ((UP, (x, y - 1)), (LEFT, (x - 1, y - 1)), (DOWN, (x - 1, y)), (RIGHT, (x, y)), (NOOP, (x, y))):
        env.step(action)
        assert tuple(env.player.pos) == position, ACTION_NAMES[action]


def test_do_takes_the_faced_tree_and_nothing_else() -> None:
    env = CrafterChop()
    env.reset(seed=0)
    x, y = place(env, [(1, 0), (-1, 0)])
    assert env.step(DO)[1] == 0.0  # faces down, to grass
    assert env.step(RIGHT)[1] == 0.0
    _, reward, terminated, truncated, info = env.step(DO)
    assert (reward, terminated, truncated) == (1.0, False, False)
    assert info == {"trees_taken": 1, "trees_left": 1}
    assert env.world[x + 1, y][0] == "grass" and env.world[x - 1, y][0] == "tree"
    assert env.step(DO)[1] == 0.0  # it is gone


def test_more_than_nine_trees_are_counted() -> None:
    """Crafter's inventory ends at 9 logs; the reward must not."""
    env = CrafterChop(length=200, tree_fraction=0.5)
    env.reset(seed=0)
    total = 0.0
    for _ in range(12):
        place(env, [(0, 1)])
        env.step(DOWN)
        total += env.step(DO)[1]
    assert total == 12.0


def test_water_and_the_edge_hold_the_player_in() -> None:
    for border in (True, False):
        env = CrafterChop(camera="arena", border=border, tree_fraction=0.02)
        env.reset(seed=1)
        place(env, [])
        for action in (LEFT, UP, RIGHT, DOWN):
            for _ in range(9):
                env.step(action)
            env.step(DO)
            assert env.player is not None
            low = env.config.border_width[0]
            assert all(low <= p < low + n for p, n in zip(env.player.pos, env.config.interior, strict=True))
            env.reset(seed=1)
            place(env, [])


def test_truncates_at_length_never_terminates_and_then_needs_a_reset() -> None:
    env = CrafterChop(length=5)
    with pytest.raises(ValueError, match="reset"):
        env.step(NOOP)
    env.reset(seed=0)
    ends = [env.step(NOOP)[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]
    with pytest.raises(ValueError, match="reset"):
        env.step(NOOP)
    env.reset()
    with pytest.raises(ValueError, match="action is 6"):
        env.step(6)


@pytest.mark.parametrize("config", [*CONFIGS, {"arena": (2, 1), "tree_fraction": 0.01}, {"arena": (9, 9), "tree_fraction": 0.97}])
def test_starts_on_grass_with_a_tree_in_reach(config: dict[str, Any]) -> None:
    env = CrafterChop(**config)
    starts = set()
    for seed in range(20):
        _, info = env.reset(seed=seed)
        assert env.player is not None
        start = (int(env.player.pos[0]), int(env.player.pos[1]))
        starts.add(start)
        assert env.world[start][0] == "grass"
        width, height = env.config.interior
        assert info["trees_left"] == min(max(round(env.config.tree_fraction * width * height), 1), width * height - 1)
        reached, todo, has_tree = {start}, [start], False
        while todo:
            x, y = todo.pop()
            for tile in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                has_tree |= env.world[tile][0] == "tree"
                if env.world[tile][0] == "grass" and tile not in reached:
                    reached.add(tile)
                    todo.append(tile)
        assert has_tree, f"seed {seed}: no tree in reach of {start}"
    assert len(starts) > 1


def test_border_and_visible_tiles() -> None:
    tiles = {}
    for border in (True, False):
        env = CrafterChop(camera="arena", border=border)
        env.reset(seed=0)
        tiles[border] = env.visible_tiles()
    edge = np.ones((8, 8), bool)
    edge[1:-1, 1:-1] = False
    assert (tiles[True][edge] == WATER).all() and np.isin(tiles[True][~edge], (GRASS, TREE)).all()
    assert np.isin(tiles[False], (GRASS, TREE)).all()
    env = CrafterChop()
    for seed in range(20):  # with its border the player-centred view never shows the void
        env.reset(seed=seed)
        assert not (env.visible_tiles() == OUTSIDE).any()


PROGRAM = """
import hashlib, random, sys
import numpy as np
junk = [object() for _ in range(int(sys.argv[1]))]  # other memory addresses
random.seed(int(sys.argv[1])); np.random.seed(int(sys.argv[1]))
from dreamer.envs.crafter_chop import CrafterChop
env, digest = CrafterChop(), hashlib.sha256()
for seed in (3, None, 5):
    frame, _ = env.reset(seed=seed)
    for action in np.random.default_rng(0).integers(0, 6, 64):
        digest.update(frame.tobytes())
        frame, reward, *_ = env.step(int(action))
        digest.update(bytes([int(reward)]))
print(digest.hexdigest())
"""


def test_episodes_are_the_same_in_every_process() -> None:
    outputs = []
    for hash_seed in ("0", "12345"):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, hash_seed],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(result.stdout.strip())
    assert outputs[0] == outputs[1] and len(outputs[0]) == 64


def test_seeds_give_different_worlds_and_reset_without_seed_goes_on() -> None:
    env = CrafterChop()
    digests = [hashlib.sha256(env.reset(seed=seed)[0].tobytes()).hexdigest() for seed in range(20)]
    assert len(set(digests)) == 20
    first = env.reset(seed=1)[0]
    assert (env.reset()[0] != first).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": "bird"}, "camera"),
        ({"view": (9, 9)}, "do not divide 64"),
        ({"view": (0, 8)}, "view"),
        ({"arena": (1, 1)}, "no room"),
        ({"camera": "arena", "arena": (8, 8)}, "do not fit"),
        ({"tree_fraction": 0.0}, "tree_fraction"),
        ({"length": 0}, "length"),
        ({"trees": 3}, "trees"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrafterChop(**options)
