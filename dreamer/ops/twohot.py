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


def symexp_bins(low: float, high: float, num_bins: int, device: torch.device | None = None) -> Float[Tensor, " Q"]:
    """Scalars that the bins stand for: evenly spaced in [low, high] in symlog units, so dense around zero."""
    return symexp(torch.linspace(low, high, num_bins, device=device, dtype=torch.float32))


def twohot_encode(x: Float[Tensor, "*S"], low: float, high: float, num_bins: int) -> Float[Tensor, "*S Q"]:
    """Weights of the two bins around x, for bins evenly spaced in [low, high] in symlog units.

    Every row sums to 1 and its mean bin is x exactly, so that the code of a random scalar's mean is the mean of its codes; values
    outside the range are clamped to the end bins.
    """
    bins = symexp_bins(low, high, num_bins, x.device)
    x = x.float().clamp(bins[0].item(), bins[-1].item())
    index = (torch.searchsorted(bins, x.contiguous(), right=True) - 1).clamp(0, num_bins - 2)
    above_weight = ((x - bins[index]) / (bins[index + 1] - bins[index])).unsqueeze(-1)
    return F.one_hot(index, num_bins) * (1 - above_weight) + F.one_hot(index + 1, num_bins) * above_weight


def twohot_decode(logits: Float[Tensor, "*S Q"], low: float, high: float) -> Float[Tensor, "*S"]:
    """The scalar that bin logits stand for: the mean of the bins. Opposite bins are added first, so that equal logits give 0."""
    weighted = logits.float().softmax(-1) * symexp_bins(low, high, logits.shape[-1], logits.device)
    return (weighted + weighted.flip(-1)).sum(-1) / 2


def twohot_cross_entropy(logits: Float[Tensor, "*S Q"], targets: Float[Tensor, "*S"], low: float, high: float) -> Float[Tensor, "*S"]:
    """Cross-entropy (nats) between the two-hot code of ``targets`` and the predicted bins."""
    code = twohot_encode(targets.float(), low, high, logits.shape[-1])
    return -(code * logits.float().log_softmax(-1)).sum(-1)
