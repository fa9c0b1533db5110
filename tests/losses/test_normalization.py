"""Loss terms divided by a running estimate of their own root mean square."""

from __future__ import annotations

import math

import pytest
import torch

from dreamer.losses import LossNormalizer


def test_the_first_value_becomes_one_whatever_its_size() -> None:
    normalizer = LossNormalizer(("a", "b"))
    assert normalizer("a", torch.tensor(250.0)).item() == pytest.approx(1.0, rel=1e-4)  # without bias correction: 10
    assert normalizer("b", torch.tensor(1e-3)).item() == pytest.approx(1.0, rel=1e-4)


def test_running_rms_by_hand() -> None:
    normalizer = LossNormalizer(("a",), decay=0.5)
    normalizer("a", torch.tensor(2.0))
    out = normalizer("a", torch.tensor(4.0))
    # mean square: 0.5 * (0.5 * 4) + 0.5 * 16 = 9, corrected by 1 - 0.5^2: 12
    assert out.item() == pytest.approx(4 / math.sqrt(12))


def test_the_estimate_settles_at_the_rms() -> None:
    normalizer = LossNormalizer(("a",), decay=0.9)
    for i in range(200):
        out = normalizer("a", torch.tensor(3.0 if i % 2 else 4.0))
    assert out.item() == pytest.approx(3 / math.sqrt(12.5), rel=0.05)


def test_terms_do_not_mix() -> None:
    normalizer = LossNormalizer(("a", "b"))
    for _ in range(5):
        normalizer("a", torch.tensor(100.0))
    assert normalizer("b", torch.tensor(2.0)).item() == pytest.approx(1.0, rel=1e-4)


def test_gradients_are_scaled_and_do_not_flow_through_the_estimate() -> None:
    normalizer = LossNormalizer(("a",))
    loss = torch.tensor(8.0, requires_grad=True)
    normalizer("a", loss).backward()
    assert loss.grad is not None
    assert loss.grad.item() == pytest.approx(1 / 8, rel=1e-4)


def test_state_travels_with_the_run() -> None:
    first = LossNormalizer(("a", "b"))
    for value in (1.0, 5.0, 2.0):
        first("a", torch.tensor(value))
    second = LossNormalizer(("a", "b"))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first("a", torch.tensor(3.0)), second("a", torch.tensor(3.0)))
    assert torch.equal(first.mean_square, second.mean_square)


def test_evaluation_does_not_move_the_estimate() -> None:
    normalizer = LossNormalizer(("a",))
    normalizer("a", torch.tensor(2.0))
    before = normalizer.mean_square.clone()
    normalizer.eval()
    assert normalizer("a", torch.tensor(6.0)).item() == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(normalizer.mean_square, before)


def test_evaluation_before_any_training_leaves_the_loss_as_it_is() -> None:
    assert LossNormalizer(("a",)).eval()("a", torch.tensor(6.0)) == 6.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_left_out_of_the_estimate_but_not_hidden(bad: float) -> None:
    normalizer = LossNormalizer(("a",))
    normalizer("a", torch.tensor(2.0))
    before = normalizer.mean_square.clone()
    assert not torch.isfinite(normalizer("a", torch.tensor(bad)))
    assert torch.equal(normalizer.mean_square, before)
    assert torch.isfinite(normalizer("a", torch.tensor(2.0)))


def test_a_loss_without_rows_is_no_measurement() -> None:
    normalizer = LossNormalizer(("a",))
    assert normalizer("a", torch.tensor(0.0), False) == 0  # before any measurement
    normalizer("a", torch.tensor(2.0))
    before = normalizer.mean_square.clone(), normalizer.count.clone()
    assert normalizer("a", torch.tensor(0.0), False) == 0
    assert (normalizer.mean_square, normalizer.count) == before
    normalizer("a", torch.tensor(0.0))  # a loss of 0 that was measured counts
    assert normalizer.mean_square < before[0]


def test_zero_losses_stay_zero() -> None:
    normalizer = LossNormalizer(("a",))
    assert normalizer("a", torch.tensor(0.0)) == 0
    assert torch.isfinite(normalizer("a", torch.tensor(1.0)))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        LossNormalizer(("a",))("dynamics", torch.tensor(1.0))
