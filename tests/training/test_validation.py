"""Validation: the action gap tells a model that heeds actions from one that does not; hooks are deterministic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamer.models import Agent, AgentConfig, DynamicsConfig, DynamicsOutput, TransformerConfig
from dreamer.training.logging import RunLogger
from dreamer.training.validation import action_gap, all_of, other_actions
from dreamer.types import ActionComponent, ActionSpace, Batch

SPACE = ActionSpace(
    (
        ActionComponent("move", "categorical", 4),
        ActionComponent("keys", "binary", 2),
        ActionComponent("aim", "continuous", 1, -2.0, 3.0),
    )
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_other_actions_differ_and_lie_in_the_space() -> None:
    g = generator()
    move, keys = torch.randint(0, 4, (50, 1), generator=g), torch.randint(0, 2, (50, 2), generator=g)
    actions = torch.cat([move, keys, torch.rand(50, 1, generator=g)], dim=1).float()
    other = other_actions(SPACE, actions, g)
    SPACE.validate(other.numpy(), "test")
    assert (other[:, :3] != actions[:, :3]).all()
    assert set(other[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0}


def fake_agent(heeds: bool, seen: dict[str, Tensor]) -> Agent:
    """An agent whose dynamics predicts what the action says (``heeds``), or zeros; ``seen`` tells how it was asked."""
    transformer = TransformerConfig(width=8, num_layers=1, num_heads=1, num_kv_heads=1)
    config = AgentConfig(dynamics=DynamicsConfig(transformer=transformer, max_steps=16))
    space = ActionSpace((ActionComponent("move", "categorical", 4),))
    agent = Agent(config, action_space=space, token_grid=(1, 2), latent_channels=5)

    def forward(noisy: Tensor, signal_idx: Tensor, step_idx: Tensor, actions: Tensor, mask: Tensor) -> DynamicsOutput:
        seen.update(noisy=noisy, signal_idx=signal_idx, step_idx=step_idx)
        said = actions[:, :, 0, :1].unsqueeze(2).expand(-1, -1, noisy.shape[2], noisy.shape[3])
        return DynamicsOutput(said if heeds else torch.zeros_like(noisy), None)

    agent.dynamics.forward = forward
    return agent


def batch() -> Batch:
    """The latents are what the last action says, and a little more, so that no error is 0."""
    space_actions = torch.randint(0, 4, (16, 3, 1, 1), generator=generator()).float()
    known, none = torch.ones(16, 3, 1, dtype=torch.bool), torch.zeros(16, 3, dtype=torch.bool)
    return Batch(
        latents=space_actions.expand(-1, -1, 2, 5) + 0.1,
        prev_actions=space_actions,
        prev_action_mask=known,
        actions=space_actions,
        action_mask=known,
        rewards=torch.zeros(16, 3),
        terminals=none,
        task=torch.zeros(16, dtype=torch.long),
        has_rewards=torch.ones(16, dtype=torch.bool),
        is_relevant=torch.zeros(16, dtype=torch.bool),
    )


@pytest.mark.parametrize("heeds", [True, False])
def test_the_gap_is_zero_for_a_model_that_ignores_actions(heeds: bool) -> None:
    seen: dict[str, Tensor] = {}
    gap = action_gap(fake_agent(heeds, seen), batch(), 0.9, generator())
    if heeds:
        assert gap["val_next_mse"] == pytest.approx(0.01, rel=1e-3) and gap["val_action_gap_db"] > 15
    else:
        assert gap["val_action_gap_db"] == 0.0 and gap["val_next_mse"] == gap["val_next_mse_other_action"]
    assert seen["signal_idx"][0].tolist() == [14, 14, 0]  # 0.9 of 16, and pure noise
    assert (seen["step_idx"] == 4).all()


def test_the_last_step_of_the_gap_holds_no_trace_of_the_truth() -> None:
    seen: dict[str, Tensor] = {}
    noisy = []
    for offset in (0.0, 50.0):
        made = batch()
        latents = made.latents.clone()
        latents[:, -1] += offset
        action_gap(fake_agent(True, seen), dataclasses.replace(made, latents=latents), 0.9, generator())
        noisy.append(seen["noisy"])
    assert torch.equal(noisy[0], noisy[1])


def test_hooks_join_their_metrics(tmp_path: Path) -> None:
    hook = all_of(lambda logger, step: {"a": 1.0}, lambda logger, step: {"b": float(step)})
    with RunLogger(tmp_path, "x", total_steps=5, tensorboard=False) as logger:
        assert hook(logger, 3) == {"a": 1.0, "b": 3.0}
