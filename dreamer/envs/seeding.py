"""Seeds of episodes and of players: pure functions, the same in every process and on every machine."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["record", "evaluate"]
_PURPOSES: dict[Purpose, int] = {"record": 1, "evaluate": 2}
_PLAYER = 3


def episode_seed(seed: int, index: int, purpose: Purpose) -> int:
    """The seed (31 bits) of episode ``index`` of a run. Recorded and evaluated episodes of one seed have nothing in common."""
    return int(np.random.SeedSequence((seed, _PURPOSES[purpose], index)).generate_state(1)[0] >> 1)


def player_rng(seed: int) -> np.random.Generator:
    """A generator for a player, independent of that of the environment with the same seed."""
    return np.random.default_rng((seed, _PLAYER))
