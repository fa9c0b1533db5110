"""Symexp two-hot coding of scalars (DreamerV3; used for rewards and values in Dreamer 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def symlog(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """sign(x) ln(1 + |x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """sign(x) (e^|x| - 1), the inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def twohot_encode(x: Float[Tensor, "*S"], low: float, high: float, num_bins: int) -> Float[Tensor, "*S Q"]:
    """Weights of the two bins around symlog(x), on ``num_bins`` bins evenly spaced in [low, high] (symlog units).

    Every row sums to 1 and, as long as symlog(x) lies within the range, its mean bin is symlog(x) exactly; values outside are
    clamped to the end bins.
    """
    position = (symlog(x).clamp(low, high) - low) / (high - low) * (num_bins - 1)
    below = position.floor().clamp(max=num_bins - 2)
    above_weight = (position - below).unsqueeze(-1)
    index = below.long()
    return F.one_hot(index, num_bins) * (1 - above_weight) + F.one_hot(index + 1, num_bins) * above_weight


def twohot_decode(logits: Float[Tensor, "*S Q"], low: float, high: float) -> Float[Tensor, "*S"]:
    """The scalar that bin logits stand for: symexp of the mean bin."""
    bins = torch.linspace(low, high, logits.shape[-1], device=logits.device, dtype=torch.float32)
    return symexp((logits.float().softmax(-1) * bins).sum(-1))


def twohot_cross_entropy(logits: Float[Tensor, "*S Q"], targets: Float[Tensor, "*S"], low: float, high: float) -> Float[Tensor, "*S"]:
    """Cross-entropy (nats) between the two-hot code of ``targets`` and the predicted bins."""
    code = twohot_encode(targets.float(), low, high, logits.shape[-1])
    return -(code * logits.float().log_softmax(-1)).sum(-1)
