"""Settings of phase 3 that cannot go together."""

from __future__ import annotations

import pytest

from dreamer.training.loop import TrainConfig
from dreamer.training.phase3 import ImaginationConfig, Phase3Config


def test_accumulation_and_several_updates_a_rollout_are_refused_together() -> None:
    accumulate, updates = TrainConfig(accumulate=2), ImaginationConfig(updates_per_rollout=4)
    Phase3Config(train=accumulate)
    Phase3Config(imagination=updates)
    with pytest.raises(ValueError, match=r"accumulate is 2 and imagination\.updates_per_rollout 4"):
        Phase3Config(train=accumulate, imagination=updates)
