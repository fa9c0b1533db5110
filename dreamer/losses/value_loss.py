"""TD(lambda) learning of the value head (Dreamer 4, Eq. 10)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dreamer.ops.shares import total
from dreamer.ops.twohot import twohot_cross_entropy


def value_loss(
    logits: Float[Tensor, "B R Q"], returns: Float[Tensor, "B R"], weights: Float[Tensor, "B R"], bin_range: float
) -> Float[Tensor, ""]:
    """Two-hot cross-entropy between v_t and the lambda-return R_t (no gradient through it), averaged by ``weights``.

    The weights are the probabilities that the imagined episode still runs at t.
    """
    loss = twohot_cross_entropy(logits, returns.detach(), -bin_range, bin_range)
    return total((loss * weights).sum()) / total(weights.sum()).clamp(min=1e-8)
