"""Phase 2 losses on the agent token: behaviour cloning, reward and continue prediction, with multi-token prediction (Eq. 9).

Shape letters: B batch, T latent steps, M distances (n = 0 .. M - 1), P actions per step, Q two-hot bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dreamer.ops.shares import total
from dreamer.ops.twohot import twohot_cross_entropy


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where ``mask`` is True; 0 where there are none."""
    return total(torch.where(mask, values, 0.0).sum()) / total(mask.sum()).clamp(min=1)


def behaviour_cloning_loss(log_probs: Float[Tensor, "B T M P"], mask: Bool[Tensor, "B T M P"]) -> Float[Tensor, ""]:
    """-ln pi(a_{t+n} | h_t), mean over the known actions."""
    return -masked_mean(log_probs, mask)


def reward_loss(
    logits: Float[Tensor, "B T M Q"], rewards: Float[Tensor, "B T M"], mask: Bool[Tensor, "B T M"], bin_range: float
) -> Float[Tensor, ""]:
    """Two-hot cross-entropy of r_{t+n}, mean over the known rewards."""
    return masked_mean(twohot_cross_entropy(logits, rewards, -bin_range, bin_range), mask)


def continue_loss(logits: Float[Tensor, "B T M"], terminals: Bool[Tensor, "B T M"], mask: Bool[Tensor, "B T M"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of c_{t+n} = not terminal, mean over the known steps."""
    return masked_mean(F.binary_cross_entropy_with_logits(logits, (~terminals).float(), reduction="none"), mask)
