"""Settings of phase 2 with which no row would ever teach the policy."""

from __future__ import annotations

import pytest

from dreamer.losses import ShortcutForcingConfig
from dreamer.training.loop import TrainConfig
from dreamer.training.phase2 import Phase2Config, RelevantConfig


def test_relevant_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        RelevantConfig(fraction=0.0)
    sixteen = TrainConfig(batch_size=16)
    with pytest.raises(ValueError, match=r"relevant\.fraction is 0\.03 of train\.batch_size = 16: no row would teach the policy"):
        Phase2Config(train=sixteen, relevant=RelevantConfig(fraction=0.03))
    Phase2Config(train=sixteen, relevant=RelevantConfig(fraction=0.04))
    Phase2Config(train=sixteen, relevant=RelevantConfig(fraction=1.0))


def test_a_setting_for_rows_that_teach_heads_alone_needs_uniform_rows() -> None:
    only = RelevantConfig(fraction=1.0)
    with pytest.raises(ValueError, match=r"relevant\.fraction is 1 and shortcut\.heads_context_fraction is set"):
        Phase2Config(relevant=only, shortcut=ShortcutForcingConfig(heads_context_fraction=1.0))
    Phase2Config(relevant=only)
