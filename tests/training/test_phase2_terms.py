"""The terms of phase 2 written out step by step, their weights and scales, and which rows the bootstrap teacher is asked about."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamer.losses import ShortcutForcingConfig
from dreamer.models import Agent, AgentConfig, Dynamics, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.training.loop import Phase
from dreamer.training.phase1 import Phase1
from dreamer.training.phase2 import AgentLossConfig, Phase2
from dreamer.types import ActionComponent, ActionSpace, Batch

SPACE = ActionSpace((ActionComponent("move", "categorical", 3), ActionComponent("keys", "binary", 2)))
ROWS, STEPS, SLOTS, DISTANCES = 8, 5, 2, 2
TERMS = ("dynamics", "policy", "reward", "continue")


@pytest.fixture
def agent(formulas: Any) -> Agent:
    transformer = TransformerConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, time_every=2, context_length=6)
    dynamics = DynamicsConfig(transformer=transformer, num_registers=1, max_steps=4, num_tasks=ROWS)
    heads = HeadConfig(hidden=8, num_distances=DISTANCES, num_bins=formulas.NUM_BINS, bin_range=formulas.BIN_RANGE)
    config = AgentConfig(dynamics=dynamics, heads=heads)
    made = Agent(config, action_space=SPACE, token_grid=(1, 2), latent_channels=4, actions_per_step=SLOTS)
    for head in (made.policy, made.reward, made.continue_):  # they begin with zeros, where nothing shows
        nn.init.normal_(head.mlp.out.weight, std=0.5)
    return made


def draw_actions(g: torch.Generator) -> Tensor:
    moves = torch.randint(0, 3, (ROWS, STEPS, SLOTS, 1), generator=g)
    return torch.cat([moves, torch.randint(0, 2, (ROWS, STEPS, SLOTS, 2), generator=g)], dim=-1).float()


@pytest.fixture
def batch() -> Batch:
    """No two rows, and no two steps of a row, are alike; relevant rows and rows without rewards stand anywhere."""
    g = torch.Generator().manual_seed(3)
    return Batch(
        latents=torch.randn(ROWS, STEPS, 2, 4, generator=g),
        prev_actions=draw_actions(g),
        prev_action_mask=torch.rand(ROWS, STEPS, SLOTS, generator=g) < 0.7,
        actions=draw_actions(g),
        action_mask=torch.rand(ROWS, STEPS, SLOTS, generator=g) < 0.7,
        rewards=torch.randn(ROWS, STEPS, generator=g) * 3,
        terminals=torch.rand(ROWS, STEPS, generator=g) < 0.3,
        task=torch.randperm(ROWS, generator=g),
        has_rewards=torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool(),
        is_relevant=torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool(),
    )


ORDER = [1, 4, 5, 7, 0, 2, 3, 6]  # of the fixture's rows in the phase: relevant rows first
SHORTCUT = ShortcutForcingConfig(bootstrap_fraction=0.5, independent_fraction=0.4)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def watch(dynamics: Dynamics) -> list[tuple[dict[str, Any], Tensor | None]]:
    """Fills up with every call of the dynamics: its arguments by name, and the features that came out."""
    calls: list[tuple[dict[str, Any], Tensor | None]] = []
    signature = inspect.signature(Dynamics.forward)

    def note(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        calls.append((bound.arguments, output.features))

    dynamics.register_forward_hook(note, with_kwargs=True)
    return calls


# The terms


@torch.no_grad()
def by_hand(formulas: Any, agent: Agent, batch: Batch, features: Tensor, no_history: Tensor) -> dict[str, float]:
    """Eq. 9 for every row b, step t and distance n; the rows as the phase put them."""
    batch = batch[torch.tensor(ORDER)]
    policy, reward, goes_on = agent.policy(features).parameters, agent.reward(features), agent.continue_(features)
    found: dict[str, list[float]] = {"policy_loss": [], "reward_loss": [], "continue_loss": []}
    for b in range(ROWS):
        for t in range(STEPS):
            for n in range(DISTANCES):
                if no_history[b] or t + n >= STEPS:
                    continue
                if batch.has_rewards[b]:
                    found["reward_loss"].append(float(formulas.cross_entropy(reward[b, t, n], float(batch.rewards[b, t + n]))))
                    logit = goes_on[b, t, n]
                    found["continue_loss"].append(-float(formulas.log_sigmoid(-logit if batch.terminals[b, t + n] else logit)))
                for slot in range(SLOTS):
                    if batch.is_relevant[b] and batch.action_mask[b, t + n, slot]:
                        found["policy_loss"].append(-float(formulas.log_prob(policy[b, t, n, slot], batch.actions[b, t + n, slot])))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_every_head_learns_what_was_recorded_at_its_step(formulas: Any, agent: Agent, batch: Batch) -> None:
    calls = watch(agent.dynamics)
    _, metrics = Phase2(agent, SHORTCUT, AgentLossConfig())(batch, 0, generator())
    (given, features), no_history = calls[0], calls[0][0]["no_history"]
    assert features is not None and no_history is not None and 0 < no_history.sum() < ROWS
    assert torch.equal(given["prev_actions"], batch.prev_actions[torch.tensor(ORDER)])
    assert torch.equal(given["task"], batch.task[torch.tensor(ORDER)])
    expected = by_hand(formulas, agent, batch, features, no_history)
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


# Weights and scales


def own_gradients(agent: Agent, batch: Batch, config: AgentLossConfig) -> dict[str, Tensor]:
    """By term, the gradient of what no other term reaches: a head, or the layer that predicts latents."""
    agent.zero_grad()
    loss, _ = Phase2(agent, SHORTCUT, config)(batch, 0, generator())
    loss.backward()
    own = {"dynamics": agent.dynamics.latent_out, "policy": agent.policy, "reward": agent.reward, "continue": agent.continue_}
    none = torch.zeros(1)
    return {name: torch.cat([none if p.grad is None else p.grad.flatten() for p in part.parameters()]) for name, part in own.items()}


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("changed", TERMS)
def test_a_weight_scales_its_own_term_alone(agent: Agent, batch: Batch, changed: str, normalize: bool, weight: float) -> None:
    plain = own_gradients(agent, batch, AgentLossConfig(normalize_losses=normalize))
    assert all(gradient.abs().max() > 1e-4 for gradient in plain.values())
    config = AgentLossConfig.model_validate({"normalize_losses": normalize, f"{changed}_weight": weight})
    weighted = own_gradients(agent, batch, config)
    for name in TERMS:
        torch.testing.assert_close(weighted[name], plain[name] * (weight if name == changed else 1.0), rtol=1e-4, atol=1e-7)


def test_each_term_is_divided_by_its_own_running_scale(agent: Agent, batch: Batch) -> None:
    phase, other = Phase2(agent, SHORTCUT, AgentLossConfig()), dataclasses.replace(batch, rewards=batch.rewards * 2 + 1)
    before, (loss, metrics) = phase(batch, 0, generator())[1], phase(other, 1, generator())
    first, second = ([float(m[f"{name}_loss"]) for name in TERMS] for m in (before, metrics))
    assert first[2] != second[2]
    mean_squares = [(0.99 * 0.01 * a**2 + 0.01 * b**2) / (1 - 0.99**2) for a, b in zip(first, second, strict=True)]
    assert loss.item() == pytest.approx(sum(b / math.sqrt(m) for b, m in zip(second, mean_squares, strict=True)), rel=1e-4)
    phase.eval()
    phase.normalizer.mean_square.copy_(torch.tensor([4.0, 9.0, 25.0, 49.0]))
    phase.normalizer.count.fill_(10_000)  # no bias is left to correct
    assert phase(other, 1, generator())[0].item() == pytest.approx(sum(b / d for b, d in zip(second, (2, 3, 5, 7), strict=True)), rel=1e-4)


def test_without_scales_the_loss_is_the_weighted_sum(agent: Agent, batch: Batch) -> None:
    config = AgentLossConfig(dynamics_weight=2, policy_weight=3, reward_weight=5, continue_weight=7, normalize_losses=False)
    phase = Phase2(agent, SHORTCUT, config)
    for step in range(2):  # nothing is remembered between them
        loss, metrics = phase(batch, step, generator())
        expected = sum(weight * float(metrics[f"{name}_loss"]) for weight, name in zip((2, 3, 5, 7), TERMS, strict=True))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


# The bootstrap teacher


@pytest.mark.parametrize(("kind", "rows"), [("phase1", [4, 5, 6, 7]), ("phase2", [3, 6])])  # half of all rows; of the uniform ones
def test_the_teacher_is_asked_about_the_bootstrap_rows_as_they_are(agent: Agent, batch: Batch, kind: str, rows: list[int]) -> None:
    made = {"phase1": lambda: Phase1(agent, SHORTCUT), "phase2": lambda: Phase2(agent, SHORTCUT, AgentLossConfig())}
    phase: Phase = made[kind]()
    calls = watch(agent.dynamics)
    phase(batch, 0, generator())
    student, first, second = (given for given, _ in calls)
    mixed = student["no_history"].tolist()
    assert len({tuple(mixed[-len(rows) :]), tuple(mixed[: len(rows)])}) == 2, "other rows would look the same; take another seed"
    order = torch.arange(ROWS) if kind == "phase1" else torch.tensor(ORDER)
    assert torch.equal(student["prev_actions"], batch.prev_actions[order])
    assert torch.equal(student["prev_action_mask"], batch.prev_action_mask[order])
    assert student["task"] is None if kind == "phase1" else torch.equal(student["task"], batch.task[order])
    for teacher in (first, second):
        assert torch.equal(teacher["prev_actions"], batch.prev_actions[rows])
        assert torch.equal(teacher["prev_action_mask"], batch.prev_action_mask[rows])
        assert torch.equal(teacher["no_history"], student["no_history"][-len(rows) :])
        assert teacher["task"] is None  # no head listens, and no latent may depend on it
        assert teacher["cache"] is None and teacher["write"] is False
    assert torch.equal(first["noisy"], student["noisy"][-len(rows) :])
    assert torch.equal(first["signal_idx"], student["signal_idx"][-len(rows) :])


@pytest.mark.parametrize("kind", ["phase1", "phase2"])
def test_the_teacher_is_the_student_without_gradient(agent: Agent, batch: Batch, kind: str) -> None:
    """The loss of bootstrap rows moves with the weights, but not through the two half steps."""
    made = {"phase1": lambda: Phase1(agent, SHORTCUT), "phase2": lambda: Phase2(agent, SHORTCUT, AgentLossConfig())}
    phase: Phase = made[kind]()
    graded: list[bool] = []
    agent.dynamics.register_forward_hook(lambda module, args, output: graded.append(output.latents.requires_grad))
    phase(batch, 0, generator())
    assert graded == [True, False, False]
