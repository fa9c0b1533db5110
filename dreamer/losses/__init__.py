"""Losses: pure functions with their equation, and thin classes that hold their settings."""

from dreamer.losses.agent_loss import behaviour_cloning_loss, continue_loss, reward_loss
from dreamer.losses.normalization import LossNormalizer
from dreamer.losses.pmpo_loss import PMPOConfig, PMPOLoss, pmpo_loss
from dreamer.losses.shortcut_loss import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.losses.tokenizer_loss import tokenizer_loss
from dreamer.losses.value_loss import value_loss

__all__ = [
    "LossNormalizer",
    "PMPOConfig",
    "PMPOLoss",
    "ShortcutForcingConfig",
    "ShortcutForcingLoss",
    "behaviour_cloning_loss",
    "continue_loss",
    "pmpo_loss",
    "reward_loss",
    "tokenizer_loss",
    "value_loss",
]
