"""PMPO: policy optimisation from the signs of the advantages (Dreamer 4, Eq. 11)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dreamer.ops.shares import total
from dreamer.types import Config


class PMPOConfig(Config):
    alpha: float = Field(default=0.5, ge=0, le=1)  # weight of the good actions; 1 - alpha of the bad ones
    beta: float = Field(default=0.3, ge=0)  # weight of the KL to the prior policy


def pmpo_loss(
    log_probs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    kl: Float[Tensor, "B R"],
    weights: Float[Tensor, "B R"],
    alpha: float = 0.5,
    beta: float = 0.3,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """L = (1 - alpha) / |D-| sum_{A<0} ln pi - alpha / |D+| sum_{A>=0} ln pi + beta / N sum KL[pi || prior].

    Only the signs of the advantages enter, as boolean masks, so no gradient can flow through them. An empty D+ or D- contributes 0.
    ``kl`` is the reverse KL: the learned policy comes first. ``weights`` (all 1 in the paper) count a state by the probability
    that the imagined episode still runs there.
    """
    positive = (advantages >= 0).float() * weights
    negative = (advantages < 0).float() * weights

    def mean_over(mask: Tensor) -> Tensor:
        return total((log_probs * mask).sum()) / total(mask.sum()).clamp(min=1e-8)

    num_states = total(weights.sum()).clamp(min=1e-8)
    kl_mean = total((kl * weights).sum()) / num_states
    loss = (1 - alpha) * mean_over(negative) - alpha * mean_over(positive) + beta * kl_mean
    share = total(positive.sum()) / num_states
    return loss, {"policy_loss": loss.detach(), "kl": kl_mean.detach(), "positive_share": share.detach()}


class PMPOLoss(torch.nn.Module):
    """``pmpo_loss`` with its two settings."""

    def __init__(self, config: PMPOConfig | None = None) -> None:
        super().__init__()
        self.config = config or PMPOConfig()

    def forward(
        self,
        log_probs: Float[Tensor, "B R"],
        advantages: Float[Tensor, "B R"],
        kl: Float[Tensor, "B R"],
        weights: Float[Tensor, "B R"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        weights = torch.ones_like(advantages) if weights is None else weights
        return pmpo_loss(log_probs, advantages, kl, weights, self.config.alpha, self.config.beta)
