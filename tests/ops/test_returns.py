"""Lambda-returns against tables computed by hand and against their identities."""

from __future__ import annotations

import pytest
import torch

from dreamer.ops.returns import lambda_returns


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_table() -> None:
    # gamma 0.5, lambda 0.5: R_1 = 3 + 0.5 * 8 = 7; R_0 = 1 + 0.5 * (0.5 * 4 + 0.5 * 7) = 3.75. v_0 = 100 is not used
    returns = lambda_returns(row(1, 3), row(1, 1), row(100, 4, 8), gamma=0.5, lambda_=0.5)
    torch.testing.assert_close(returns, row(3.75, 7.0))


def test_table_with_uncertain_continues() -> None:
    # R_1 = 3 + 0.5 * 0.5 * 8 = 5; R_0 = 1 + 0.5 * 0.8 * (0.75 * 4 + 0.25 * 5) = 2.7
    returns = lambda_returns(row(1, 3), row(0.8, 0.5), row(100, 4, 8), gamma=0.5, lambda_=0.25)
    torch.testing.assert_close(returns, row(2.7, 5.0))


def test_lambda_one_is_monte_carlo_ended_by_the_last_value() -> None:
    rewards, values, gamma = torch.randn(3, 6), torch.randn(3, 7), 0.9
    returns = lambda_returns(rewards, torch.ones(3, 6), values, gamma, 1.0)
    for t in range(6):
        expected = sum(gamma ** (i - t) * rewards[:, i] for i in range(t, 6)) + gamma ** (6 - t) * values[:, 6]
        torch.testing.assert_close(returns[:, t], expected)


def test_lambda_zero_is_the_one_step_target() -> None:
    rewards, continues, values = torch.randn(3, 6), torch.rand(3, 6), torch.randn(3, 7)
    returns = lambda_returns(rewards, continues, values, 0.9, 0.0)
    torch.testing.assert_close(returns, rewards + 0.9 * continues * values[:, 1:])


def test_lambda_returns_are_the_mixture_of_n_step_returns() -> None:
    rewards, values, gamma, lambda_ = torch.randn(2, 4), torch.randn(2, 5), 0.9, 0.7
    n_step = [sum(gamma**i * rewards[:, i] for i in range(n)) + gamma**n * values[:, n] for n in range(1, 5)]
    mixed = sum((1 - lambda_) * lambda_ ** (n - 1) * n_step[n - 1] for n in range(1, 4)) + lambda_**3 * n_step[3]
    torch.testing.assert_close(lambda_returns(rewards, torch.ones(2, 4), values, gamma, lambda_)[:, 0], mixed)


def test_nothing_after_an_end_counts() -> None:
    rewards, values = torch.randn(1, 5), torch.randn(1, 6)
    continues = row(1, 1, 0, 1, 1)
    returns = lambda_returns(rewards, continues, values, 0.9, 0.95)
    torch.testing.assert_close(returns[:, 2], rewards[:, 2])  # the reward that comes with the end still counts
    later_rewards, later_values = rewards.clone(), values.clone()
    later_rewards[:, 3:] += 10
    later_values[:, 3:] += 10
    changed = lambda_returns(later_rewards, continues, later_values, 0.9, 0.95)
    assert torch.equal(changed[:, :3], returns[:, :3])
    assert not torch.equal(changed[:, 3:], returns[:, 3:])


def test_values_must_have_one_more_column() -> None:
    with pytest.raises(ValueError, match="4 columns.*one more than the 4"):
        lambda_returns(torch.zeros(1, 4), torch.ones(1, 4), torch.zeros(1, 4), 0.9, 0.9)
