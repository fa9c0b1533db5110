"""Reconstruction loss of the tokenizer (Dreamer 4, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from dreamer.ops.shares import mean

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) images in [-1, 1], (B, C, H, W) -> one distance per image


def tokenizer_loss(
    prediction: Float[Tensor, "B F C H W"],
    target: Float[Tensor, "B F C H W"],
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 0.2,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """MSE + 0.2 LPIPS on pixels in [-1, 1], over masked and visible patches alike. Without ``perceptual`` only the MSE."""
    mse = mean((prediction - target).square())
    metrics = {"mse": mse.detach()}
    if perceptual is None:
        return mse, metrics
    distance = mean(perceptual(prediction.flatten(0, 1), target.flatten(0, 1)))
    return mse + perceptual_weight * distance, metrics | {"lpips": distance.detach()}
