"""Phase 2 losses: which entries count, and what each of them costs."""

from __future__ import annotations

import math

import pytest
import torch

from dreamer.losses import behaviour_cloning_loss, continue_loss, reward_loss


def test_behaviour_cloning_is_the_mean_over_known_actions() -> None:
    log_probs = torch.tensor([[[[-1.0], [-2.0]], [[-4.0], [-8.0]]]])  # B 1, T 2, M 2, P 1
    mask = torch.tensor([[[[True], [True]], [[True], [False]]]])  # the last target lies past the window's end
    torch.testing.assert_close(behaviour_cloning_loss(log_probs, mask), torch.tensor(7 / 3))


def test_rows_that_are_not_relevant_teach_no_behaviour() -> None:
    log_probs = torch.randn(4, 3, 2, 2, requires_grad=True)
    relevant = torch.tensor([True, False, True, False])
    mask = torch.ones(4, 3, 2, 2, dtype=torch.bool) & relevant[:, None, None, None]
    loss = behaviour_cloning_loss(log_probs, mask)
    loss.backward()
    assert log_probs.grad is not None
    assert (log_probs.grad[~relevant] == 0).all()
    torch.testing.assert_close(log_probs.grad[relevant], torch.full((2, 3, 2, 2), -1 / 24))
    torch.testing.assert_close(loss, -log_probs[relevant].mean())


@pytest.mark.parametrize("hidden", [float("inf"), float("nan")])
def test_what_the_mask_hides_cannot_reach_the_loss(hidden: float) -> None:
    log_probs = torch.tensor([[[[-1.0], [hidden]]]])
    mask = torch.tensor([[[[True], [False]]]])
    torch.testing.assert_close(behaviour_cloning_loss(log_probs, mask), torch.tensor(1.0))


def test_an_empty_mask_gives_zero_and_no_gradient() -> None:
    log_probs = torch.randn(2, 3, 2, 1, requires_grad=True)
    loss = behaviour_cloning_loss(log_probs, torch.zeros(2, 3, 2, 1, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert log_probs.grad is not None
    assert (log_probs.grad == 0).all()


def test_reward_loss_by_hand() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(1, 1, 2, 3)  # bins at -1, 0, 1 in symlog units
    rewards = torch.tensor([[[0.5 * (math.e - 1), math.e - 1]]])  # codes (0, 1/2, 1/2) and (0, 0, 1)
    costs = [-(0.5 * math.log(0.3) + 0.5 * math.log(0.5)), -math.log(0.5)]
    both = torch.ones(1, 1, 2, dtype=torch.bool)
    assert reward_loss(logits, rewards, both, 1.0).item() == pytest.approx(sum(costs) / 2)
    assert reward_loss(logits, rewards, torch.tensor([[[True, False]]]), 1.0).item() == pytest.approx(costs[0])


def test_continue_loss_by_hand() -> None:
    logits = torch.tensor([[[2.0, 2.0, 0.0]]])
    terminals = torch.tensor([[[False, True, True]]])
    costs = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(2)]  # c = 1, 0, 0
    everywhere = torch.ones(1, 1, 3, dtype=torch.bool)
    assert continue_loss(logits, terminals, everywhere).item() == pytest.approx(sum(costs) / 3)
    assert continue_loss(logits, terminals, torch.tensor([[[True, True, False]]])).item() == pytest.approx(sum(costs[:2]) / 2)


def test_losses_reach_only_the_logits_that_count() -> None:
    logits = torch.zeros(2, 2, 2, 5, requires_grad=True)
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0, 1, 0] = True
    reward_loss(logits, torch.ones(2, 2, 2), mask, 2.0).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1, 0].abs().sum() > 0
    assert logits.grad.abs().sum() == logits.grad[0, 1, 0].abs().sum()
