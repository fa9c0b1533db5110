"""Reconstruction loss of the tokenizer (Eq. 5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamer.losses import tokenizer_loss


def images(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1, 1).expand(1, -1, 3, 2, 2)


def test_without_a_perceptual_network_it_is_the_mse() -> None:
    loss, metrics = tokenizer_loss(images(0.5, -0.5), images(0.0, 0.5))
    assert loss.item() == pytest.approx((0.25 + 1.0) / 2)
    assert metrics["mse"] == loss
    assert "lpips" not in metrics


def test_the_perceptual_distance_is_averaged_over_all_frames_and_weighted() -> None:
    seen: list[tuple[int, ...]] = []

    def perceptual(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(prediction.shape))
        return (prediction - target).abs().amax(dim=(1, 2, 3))

    loss, metrics = tokenizer_loss(images(0.5, -0.5), images(0.0, 0.5), perceptual)
    assert seen == [(2, 3, 2, 2)]
    assert metrics["lpips"].item() == pytest.approx(0.75)
    assert loss.item() == pytest.approx(0.625 + 0.2 * 0.75)
    loss, _ = tokenizer_loss(images(0.5, -0.5), images(0.0, 0.5), perceptual, perceptual_weight=1.0)
    assert loss.item() == pytest.approx(0.625 + 0.75)


def test_both_terms_pull_on_the_prediction() -> None:
    prediction = torch.zeros(1, 2, 3, 2, 2, requires_grad=True)
    loss, metrics = tokenizer_loss(prediction, images(0.5, -0.5), lambda p, t: (p - t).abs().mean(dim=(1, 2, 3)))
    loss.backward()
    assert prediction.grad is not None
    assert (prediction.grad[:, 0] < 0).all()
    assert (prediction.grad[:, 1] > 0).all()
    assert not any(m.requires_grad for m in metrics.values())
