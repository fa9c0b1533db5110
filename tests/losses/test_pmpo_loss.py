"""PMPO (Eq. 11) against a table computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamer.losses import PMPOConfig, PMPOLoss, pmpo_loss

ADVANTAGES = torch.tensor([[1.0, 0.0, -2.0, -0.5]])  # zero counts as good
LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0, -4.0]])
KL = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
ONES = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.5, 0.3, 0.5 * -3.5 - 0.5 * -1.5 + 0.3 * 0.25),  # = -0.925
        (0.5, 0.0, -1.0),
        (1.0, 0.0, 1.5),  # only the good actions
        (0.0, 0.0, -3.5),  # only the bad ones
        (0.25, 1.0, 0.75 * -3.5 - 0.25 * -1.5 + 0.25),
    ],
)
def test_table(alpha: float, beta: float, expected: float) -> None:
    loss, metrics = pmpo_loss(LOG_PROBS, ADVANTAGES, KL, ONES, alpha, beta)
    assert loss.item() == pytest.approx(expected)
    assert metrics["kl"].item() == pytest.approx(0.25)
    assert metrics["positive_share"].item() == pytest.approx(0.5)


def test_each_set_is_averaged_by_its_own_size() -> None:
    advantages = torch.tensor([[1.0, -1.0, -1.0, -1.0]])
    loss, _ = pmpo_loss(LOG_PROBS, advantages, KL, ONES, 0.5, 0.0)
    assert loss.item() == pytest.approx(0.5 * -3.0 - 0.5 * -1.0)  # mean(-2, -3, -4) and -1


def test_weights_count_a_state_by_the_chance_that_the_episode_still_runs() -> None:
    weights = torch.tensor([[1.0, 0.5, 1.0, 0.25]])
    loss, metrics = pmpo_loss(LOG_PROBS, ADVANTAGES, KL, weights, 0.5, 0.3)
    good, bad, kl = (-1 - 1) / 1.5, (-3 - 1) / 1.25, (0.1 + 0.1 + 0.3 + 0.1) / 2.75
    assert loss.item() == pytest.approx(0.5 * bad - 0.5 * good + 0.3 * kl)
    assert metrics["positive_share"].item() == pytest.approx(1.5 / 2.75)


def test_the_paper_weights_are_the_default() -> None:
    loss, _ = PMPOLoss()(LOG_PROBS, ADVANTAGES, KL)
    assert loss.item() == pytest.approx(-0.925)
    loss, _ = PMPOLoss(PMPOConfig(alpha=1.0, beta=0.0))(LOG_PROBS, ADVANTAGES, KL)
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.5 * -2.5), (-1.0, 0.5 * -2.5)])
def test_an_empty_set_contributes_zero_and_never_nan(sign: float, expected: float) -> None:
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, metrics = pmpo_loss(log_probs, torch.full((1, 4), sign), KL, ONES, 0.5, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert log_probs.grad is not None
    assert torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(m) for m in metrics.values())


def test_no_weight_at_all_gives_zero() -> None:
    loss, metrics = pmpo_loss(LOG_PROBS, ADVANTAGES, KL, torch.zeros(1, 4))
    assert loss == 0
    assert all(torch.isfinite(m) for m in metrics.values())


def test_good_actions_become_likelier_and_bad_ones_less_likely() -> None:
    log_probs = LOG_PROBS.clone().requires_grad_()
    pmpo_loss(log_probs, ADVANTAGES, KL, ONES)[0].backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.25, -0.25, 0.25, 0.25]]))


def test_no_gradient_flows_through_the_advantages() -> None:
    advantages, log_probs = ADVANTAGES.clone().requires_grad_(), LOG_PROBS.clone().requires_grad_()
    pmpo_loss(log_probs, advantages, KL, ONES)[0].backward()
    assert advantages.grad is None


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1e6])
def test_only_the_signs_of_the_advantages_count(scale: float) -> None:
    def loss(advantages: Tensor) -> Tensor:
        return pmpo_loss(LOG_PROBS, advantages, KL, ONES)[0]

    assert torch.equal(loss(ADVANTAGES * scale), loss(ADVANTAGES))
    assert not torch.equal(loss(-ADVANTAGES), loss(ADVANTAGES))


def test_the_kl_term_pulls_on_its_gradient() -> None:
    kl = KL.clone().requires_grad_()
    pmpo_loss(LOG_PROBS, ADVANTAGES, kl, ONES, 0.5, 0.3)[0].backward()
    torch.testing.assert_close(kl.grad, torch.full((1, 4), 0.3 / 4))
