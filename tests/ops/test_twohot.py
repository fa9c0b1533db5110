"""Symexp two-hot coding against tables computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer.ops.twohot import symexp, symlog, twohot_cross_entropy, twohot_decode, twohot_encode

E1 = math.e - 1  # symlog(e - 1) = 1


def test_symlog_table() -> None:
    x = torch.tensor([-E1, -1.0, 0.0, 1.0, E1, math.exp(3) - 1])
    torch.testing.assert_close(symlog(x), torch.tensor([-1.0, -math.log(2), 0.0, math.log(2), 1.0, 3.0]))


@given(st.floats(-1e6, 1e6, width=32))
def test_symexp_inverts_symlog(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, [0, 0, 1, 0, 0]),
        (E1, [0, 0, 0, 1, 0]),
        (-E1, [0, 1, 0, 0, 0]),
        (0.25 * E1, [0, 0, 0.75, 0.25, 0]),
        (-0.5 * (E1 + math.exp(2) - 1), [0.5, 0.5, 0, 0, 0]),
        (math.exp(2) - 1, [0, 0, 0, 0, 1]),
        (1e9, [0, 0, 0, 0, 1]),  # outside the range: the end bins
        (-1e9, [1, 0, 0, 0, 0]),
    ],
)
def test_code_table(value: float, code: list[float]) -> None:
    """Five bins at -2, -1, 0, 1, 2 in symlog units: -(e^2 - 1), -(e - 1), 0, e - 1, e^2 - 1. Weights are linear between bins."""
    torch.testing.assert_close(twohot_encode(torch.tensor(value), -2.0, 2.0, 5), torch.tensor(code, dtype=torch.float32), rtol=0, atol=1e-5)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=4))
def test_a_code_is_at_most_two_neighbours_that_sum_to_one(values: list[float]) -> None:
    code = twohot_encode(torch.tensor(values), -20.0, 20.0, 255)
    torch.testing.assert_close(code.sum(-1), torch.ones(len(values)))
    assert (code >= 0).all()
    for row in code:
        bins = row.nonzero().flatten().tolist()
        assert bins in ([bins[0]], [bins[0], bins[0] + 1])


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.01, -37.5, 1234.0])
def test_decode_inverts_encode(value: float) -> None:
    code = twohot_encode(torch.tensor([value]), -20.0, 20.0, 255)
    decoded = twohot_decode(code.clamp(min=1e-30).log(), -20.0, 20.0)
    torch.testing.assert_close(decoded, torch.tensor([value]), rtol=1e-3, atol=1e-4)


def test_a_reward_half_the_time_decodes_to_one_half() -> None:
    """The head learns the mean of its targets' codes; its decoded value must be the mean of the targets, not of their symlogs."""
    code = twohot_encode(torch.tensor([0.0, 1.0]), -3.0, 3.0, 41).mean(0)
    torch.testing.assert_close(twohot_decode(code.clamp(min=1e-30).log(), -3.0, 3.0), torch.tensor(0.5), rtol=0, atol=1e-5)


def test_equal_logits_decode_to_zero() -> None:
    torch.testing.assert_close(twohot_decode(torch.zeros(3, 255), -20.0, 20.0), torch.zeros(3), rtol=0, atol=1e-4)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()  # bins at -3, -1, 1, 3 in symlog units
    target = torch.tensor([0.5 * E1])  # a quarter of the bin -(e - 1), three quarters of the bin e - 1
    expected = -(0.25 * math.log(0.2) + 0.75 * math.log(0.3))
    torch.testing.assert_close(twohot_cross_entropy(logits, target, -3.0, 3.0), torch.tensor([expected]))


def test_cross_entropy_is_lowest_at_the_targets_own_code() -> None:
    target = torch.tensor([0.7])
    logits = torch.zeros(1, 11, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimiser.zero_grad()
        twohot_cross_entropy(logits, target, -2.0, 2.0).sum().backward()
        optimiser.step()
    torch.testing.assert_close(twohot_decode(logits.detach(), -2.0, 2.0), target, rtol=2e-2, atol=2e-2)


def test_half_precision_logits_are_scored_in_full_precision() -> None:
    logits = torch.randn(4, 255).bfloat16()
    loss = twohot_cross_entropy(logits, torch.randn(4), -20.0, 20.0)
    assert loss.dtype == torch.float32
    assert twohot_decode(logits, -20.0, 20.0).dtype == torch.float32
