"""TD(lambda) loss of the value head."""

from __future__ import annotations

import math

import pytest
import torch

from dreamer.losses import value_loss


def test_value_loss_by_hand_with_weights() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(1, 3, 3)  # bins at -1, 0, 1 in symlog units
    returns = torch.tensor([[0.0, math.e - 1, 1 - math.e]])  # symlog 0, 1, -1
    costs = [-math.log(0.3), -math.log(0.5), -math.log(0.2)]
    assert value_loss(logits, returns, torch.ones(1, 3), 1.0).item() == pytest.approx(sum(costs) / 3)
    weighted = (1.0 * costs[0] + 0.5 * costs[1]) / 1.5  # the episode surely ended before the third state
    assert value_loss(logits, returns, torch.tensor([[1.0, 0.5, 0.0]]), 1.0).item() == pytest.approx(weighted)


def test_no_gradient_flows_through_the_returns() -> None:
    logits, returns = torch.zeros(2, 3, 11, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    value_loss(logits, returns, torch.ones(2, 3), 2.0).backward()
    assert returns.grad is None
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).all()


def test_no_weight_gives_zero_not_nan() -> None:
    assert value_loss(torch.zeros(1, 2, 5), torch.ones(1, 2), torch.zeros(1, 2), 2.0) == 0
