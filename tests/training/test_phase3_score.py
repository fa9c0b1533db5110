"""The loss of phase 3 on a trajectory made by hand, against Eqs. 10 and 11 written out state by state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamer.imagination import RolloutConfig, SamplerConfig
from dreamer.losses import PMPOConfig
from dreamer.models import Agent, AgentConfig, DynamicsConfig, HeadConfig, PolicyHead, TransformerConfig
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.types import ActionComponent, ActionSpace, Trajectory

SPACE = ActionSpace((ActionComponent("move", "categorical", 3), ActionComponent("keys", "binary", 2)))
WIDTH, SLOTS, ROWS, HORIZON = 16, 2, 3, 3
GAMMA, LAMBDA, ALPHA, BETA = 0.8, 0.6, 0.3, 0.7  # none is a default, no two are alike


def make_phase(formulas: Any) -> Phase3:
    """A phase whose policy has moved away from its prior, and whose normalizer lets the terms through as they are."""
    torch.manual_seed(0)
    transformer = TransformerConfig(width=WIDTH, num_layers=1, num_heads=2, num_kv_heads=1, time_every=1, context_length=6)
    heads = HeadConfig(hidden=8, num_distances=2, num_bins=formulas.NUM_BINS, bin_range=formulas.BIN_RANGE)
    config = AgentConfig(dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=4), heads=heads)
    agent = Agent(config, action_space=SPACE, token_grid=(1, 2), latent_channels=4, actions_per_step=SLOTS)
    for head in (agent.policy, agent.value):
        nn.init.normal_(head.mlp.out.weight, std=0.5)
    phase = Phase3(
        agent,
        ImaginationConfig(
            rollout=RolloutConfig(horizon=HORIZON, context=2, sampler=SamplerConfig(num_steps=2)),
            pmpo=PMPOConfig(alpha=ALPHA, beta=BETA),
            gamma=GAMMA,
            lambda_=LAMBDA,
        ),
    )
    phase.normalizer.eval()
    return phase


def move(policy: PolicyHead) -> None:
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


@pytest.fixture
def phase(formulas: Any) -> Phase3:
    made = make_phase(formulas)
    move(made.model.policy)
    return made


@pytest.fixture
def trajectory() -> Trajectory:
    """Good and bad surprises, chances to end, and a last row that was over before it began."""
    g = torch.Generator().manual_seed(1)
    moves = torch.randint(0, 3, (ROWS, HORIZON, SLOTS, 1), generator=g)
    keys = torch.randint(0, 2, (ROWS, HORIZON, SLOTS, 2), generator=g)
    return Trajectory(
        features=torch.randn(ROWS, HORIZON + 1, WIDTH, generator=g),
        actions=torch.cat([moves, keys], dim=-1).float(),
        rewards=torch.tensor([[2.0, -3.0, 1.0], [-2.5, 2.0, -6.0], [5.0, -5.0, 5.0]]),
        continues=torch.tensor([[0.9, 0.3, 0.6], [0.5, 0.8, 0.2], [0.7, 0.4, 0.9]]),
        latents=torch.zeros(ROWS, HORIZON + 1, 2, 4),
        has_ended=torch.tensor([False, False, True]),
    )


def kl_of(formulas: Any, mine: Tensor, theirs: Tensor) -> Tensor:
    """The sum over all actions of p ln (p / q)."""
    total = torch.zeros(())
    for choice in range(3):
        for first in range(2):
            for second in range(2):
                action = torch.tensor([choice, first, second])
                log_p, log_q = formulas.log_prob(mine, action), formulas.log_prob(theirs, action)
                total = total + torch.exp(log_p) * (log_p - log_q)
    return total


def entropy_of(formulas: Any, parameters: Tensor) -> float:
    every = [torch.tensor([c, k, j]) for c in range(3) for k in range(2) for j in range(2)]
    return -sum(float(torch.exp(formulas.log_prob(parameters, a)) * formulas.log_prob(parameters, a)) for a in every)


@dataclass
class ByHand:
    value_loss: Tensor
    policy_loss: Tensor
    metrics: dict[str, float]
    advantages: list[list[float]]
    values: list[list[float]]


def by_hand(formulas: Any, agent: Agent, prior: PolicyHead, t: Trajectory) -> ByHand:
    """Eqs. 10 and 11. Gradient flows through ln pi, the KL and the value's logits alone."""
    logits = agent.value.mlp(t.features)
    mine = agent.policy(t.features).parameters[:, :, 0]  # distance 0: the action of this step
    theirs = prior(t.features).parameters[:, :, 0].detach()
    value, returns = [[0.0] * (HORIZON + 1) for _ in range(ROWS)], [[0.0] * (HORIZON + 1) for _ in range(ROWS)]
    weight, advantages = [[0.0] * HORIZON for _ in range(ROWS)], [[0.0] * HORIZON for _ in range(ROWS)]
    value_sum, kl_sum, total, entropies = torch.zeros(()), torch.zeros(()), 0.0, []
    log_probs, sizes = {True: torch.zeros(()), False: torch.zeros(())}, {True: 0.0, False: 0.0}
    for b in range(ROWS):
        for i in range(HORIZON + 1):
            p = torch.exp(logits[b, i].detach()) / torch.exp(logits[b, i].detach()).sum()
            value[b][i] = sum(float(p[q]) * formulas.BINS[q] for q in range(formulas.NUM_BINS))
        returns[b][HORIZON] = value[b][HORIZON]
        for i in reversed(range(HORIZON)):
            reward, goes_on = float(t.rewards[b, i]), float(t.continues[b, i])  # r_{i+1} and c_{i+1}
            returns[b][i] = reward + GAMMA * goes_on * ((1 - LAMBDA) * value[b][i + 1] + LAMBDA * returns[b][i + 1])
        alive = 0.0 if t.has_ended[b] else 1.0  # the chance that s_i is part of the episode
        for i in range(HORIZON):
            weight[b][i] = alive
            alive *= float(t.continues[b, i])
            advantages[b][i] = returns[b][i] - value[b][i]
            is_good = advantages[b][i] >= 0
            log_prob = sum(formulas.log_prob(mine[b, i, slot], t.actions[b, i, slot]) for slot in range(SLOTS))
            log_probs[is_good] = log_probs[is_good] + weight[b][i] * log_prob
            sizes[is_good] += weight[b][i]
            kl_sum = kl_sum + weight[b][i] * sum(kl_of(formulas, mine[b, i, slot], theirs[b, i, slot]) for slot in range(SLOTS))
            value_sum = value_sum + weight[b][i] * formulas.cross_entropy(logits[b, i], returns[b][i])
            total += weight[b][i]
            entropies.append(sum(entropy_of(formulas, mine[b, i, slot].detach()) for slot in range(SLOTS)))
    policy_loss = (1 - ALPHA) * log_probs[False] / sizes[False] - ALPHA * log_probs[True] / sizes[True] + BETA * kl_sum / total
    metrics = {
        "value_loss": (value_sum / total).item(),
        "policy_loss": policy_loss.item(),
        "kl": (kl_sum / total).item(),
        "positive_share": sizes[True] / total,
        "imagined_reward": sum(float(r) for row in t.rewards for r in row) / ROWS,
        "imagined_return": sum(row[0] for row in returns) / ROWS,
        "value": sum(v for row in value for v in row) / (ROWS * (HORIZON + 1)),
        "entropy": sum(entropies) / len(entropies),
    }
    return ByHand(value_sum / total, policy_loss, metrics, advantages, value)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def test_the_trajectory_tells_mistakes_apart(formulas: Any, phase: Phase3, trajectory: Trajectory) -> None:
    """Signs and weights are such that none of the tests below passes by chance."""
    found = by_hand(formulas, phase.model, phase.prior, trajectory)
    signs = [[a >= 0 for a in row] for row in found.advantages]
    assert signs == [[True, False, True], [False, True, False], [True, False, True]]
    against_the_next_value = found.advantages[1][1] + found.values[1][1] - found.values[1][2]
    assert against_the_next_value < 0 < found.advantages[1][1]
    assert found.metrics["kl"] > 0.1 and abs(found.metrics["value"]) > 0.05
    highest = max(abs(r) for row in trajectory.rewards.tolist() for r in row)
    assert 2 * highest < formulas.BINS[-1]  # no return is clamped to the last bin


def test_losses_and_metrics_are_those_of_the_equations(formulas: Any, phase: Phase3, trajectory: Trajectory) -> None:
    before = copy.deepcopy(phase.prior)
    expected = by_hand(formulas, phase.model, before, trajectory)
    loss, metrics = phase.score(trajectory)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx((expected.value_loss + expected.policy_loss).item(), rel=1e-4)
    value_only, _ = phase.score(trajectory, with_policy=False)
    assert value_only.item() == pytest.approx(expected.value_loss.item(), rel=1e-4)


def test_gradients_are_those_of_the_equations(formulas: Any, phase: Phase3, trajectory: Trajectory) -> None:
    """Each head's, from a loss in which returns, advantages and prior are numbers: no gradient goes through them."""
    expected, (loss, _) = by_hand(formulas, phase.model, phase.prior, trajectory), phase.score(trajectory)
    policy, value = phase.model.policy, phase.model.value
    torch.testing.assert_close(gradients(loss, policy), gradients(expected.policy_loss, policy), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients(loss, value), gradients(expected.value_loss, value), rtol=1e-3, atol=1e-5)
    assert all(g.abs().max() > 1e-3 for head in (policy, value) for g in gradients(loss, head)[-1:])


def test_no_gradient_reaches_the_imagined_states(phase: Phase3, trajectory: Trajectory) -> None:
    """A dream that carried gradient would teach the policy through the world model."""
    parts = {name: getattr(trajectory, name).clone().requires_grad_() for name in ("features", "rewards", "continues")}
    loss, _ = phase.score(Trajectory(**{**vars(trajectory), **parts}))
    assert torch.autograd.grad(loss, list(parts.values()), allow_unused=True) == (None, None, None)


def test_the_prior_is_the_policy_of_the_phases_begin(formulas: Any, trajectory: Trajectory) -> None:
    phase = make_phase(formulas)
    before = copy.deepcopy(phase.model.policy)
    assert float(phase.score(trajectory)[1]["kl"]) == pytest.approx(0.0, abs=1e-6)
    for _ in range(2):  # whatever the policy does meanwhile
        move(phase.model.policy)
        loss, metrics = phase.score(trajectory)
        assert float(metrics["kl"]) == pytest.approx(by_hand(formulas, phase.model, before, trajectory).metrics["kl"], rel=1e-4)
        loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in phase.prior.parameters())
    assert all(torch.equal(a, b) for a, b in zip(phase.prior.parameters(), before.parameters(), strict=True))


def test_each_term_is_divided_by_its_own_scale(phase: Phase3, trajectory: Trajectory) -> None:
    phase.normalizer.mean_square.copy_(torch.tensor([4.0, 25.0]))
    phase.normalizer.count.fill_(10_000)  # no bias is left to correct
    loss, metrics = phase.score(trajectory)
    torch.testing.assert_close(loss.detach(), metrics["value_loss"] / 2 + metrics["policy_loss"] / 5)
