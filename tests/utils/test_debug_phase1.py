"""The proof of x-prediction: what it says of networks that were taught clean latents, velocities, noise, and nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamer.losses import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.models import Agent, AgentConfig, DynamicsConfig, HeadConfig, TransformerConfig
from dreamer.models.dynamics import DynamicsOutput
from dreamer.training.phase1 import shortcut_step
from dreamer.types import ActionComponent, ActionSpace, Batch
from dreamer.utils import debug_phase1
from dreamer.utils.debug_phase1 import SIGNAL_LEVELS, verify_x_prediction

SPACE = ActionSpace((ActionComponent("action", "categorical", 5),))
MAX_STEPS, ROWS = 16, 32
Teach = Callable[[Tensor, Tensor, Tensor], Tensor]  # (clean, noise, noisy) -> target


def fresh_agent() -> Agent:
    torch.manual_seed(0)
    transformer = TransformerConfig(width=32, num_layers=2, num_heads=2, num_kv_heads=2, time_every=2, context_length=4)
    config = AgentConfig(
        dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=MAX_STEPS),
        heads=HeadConfig(hidden=8, num_distances=1, num_bins=11),
    )
    return Agent(config, action_space=SPACE, token_grid=(2, 2), latent_channels=3).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Videos that walk through four pictures."""
    torch.manual_seed(1)
    pictures = torch.randn(4, 4, 3)
    start = torch.arange(ROWS) % 4
    which = (start[:, None] + torch.arange(3)) % 4
    known = torch.ones(ROWS, 3, 1, dtype=torch.bool)
    actions = torch.zeros(ROWS, 3, 1, 1)
    nothing = torch.zeros(ROWS, 3)
    return Batch(
        latents=pictures[which],
        prev_actions=actions,
        prev_action_mask=known,
        actions=actions,
        action_mask=known,
        rewards=nothing,
        terminals=nothing.bool(),
        task=torch.zeros(ROWS, dtype=torch.long),
        has_rewards=torch.ones(ROWS, dtype=torch.bool),
        is_relevant=torch.zeros(ROWS, dtype=torch.bool),
    )


def train(agent: Agent, step: Callable[[torch.Generator], Tensor], num_steps: int = 200) -> Agent:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(agent.dynamics.parameters(), lr=5e-3)
    for _ in range(num_steps):
        optimizer.zero_grad()
        step(generator).backward()
        optimizer.step()
    return agent


@pytest.fixture(scope="module")
def x_predictor(batch: Batch) -> Agent:
    """Overfitted with the loss of phase 1."""
    agent, loss = fresh_agent(), ShortcutForcingLoss(ShortcutForcingConfig(), MAX_STEPS)
    return train(agent, lambda generator: shortcut_step(agent.dynamics, loss, batch, generator)[0])


def taught(batch: Batch, target: Callable[[Tensor, Tensor], Tensor]) -> Agent:
    """Overfitted to ``target(clean, noise)``."""
    agent, loss = fresh_agent(), ShortcutForcingLoss(ShortcutForcingConfig(bootstrap_fraction=0), MAX_STEPS)

    def step(generator: torch.Generator) -> Tensor:
        c = loss.corrupt(batch.latents, generator)
        tau = (c.signal_idx / MAX_STEPS)[..., None, None]
        noise = (c.noisy - tau * c.clean) / (1 - tau)
        output = agent.dynamics(c.noisy, c.signal_idx, c.step_idx, batch.prev_actions, batch.prev_action_mask).latents
        return (output - target(c.clean, noise)).square().mean()

    return train(agent, step)


def test_a_network_trained_with_the_shortcut_loss_is_an_x_predictor(x_predictor: Agent, batch: Batch) -> None:
    report = verify_x_prediction(x_predictor, batch)
    assert report.is_x_prediction and report.reads_as == "clean latents", report.text()
    assert verify_x_prediction(x_predictor.dynamics, batch) == report  # a dynamics alone, and the same figures again
    assert [level.signal_level for level in report.levels] == [*SIGNAL_LEVELS[:-1], 1 - 1 / MAX_STEPS]
    nearly_clean, half = report.levels[-1], report.levels[2]
    assert nearly_clean.clean_error < 0.1 < 0.5 < nearly_clean.velocity_error and nearly_clean.noise_error > 0.5
    assert half.implied_velocity_error < 0.5  # the velocity that it implies is the true one
    assert abs(report.levels[0].noise_share) < 0.2
    assert report.target_error < 1e-4 and report.bootstrap_error < 1e-4


def test_a_network_trained_to_predict_velocities_is_found_out(batch: Batch) -> None:
    report = verify_x_prediction(taught(batch, lambda clean, noise: clean - noise), batch)
    assert not report.is_x_prediction and report.reads_as == "velocities", report.text()
    assert report.levels[0].noise_share < -0.8 and report.levels[0].velocity_error < report.levels[0].clean_error
    assert report.trains_x_prediction  # its loss, as the package has it, would ask for clean latents: the outputs tell


def test_a_network_trained_to_predict_the_noise_is_found_out(batch: Batch) -> None:
    report = verify_x_prediction(taught(batch, lambda clean, noise: noise), batch)
    assert not report.is_x_prediction and report.reads_as == "noise" and report.levels[0].noise_share > 0.8, report.text()


def test_an_x_predictor_whose_output_is_turned_into_velocities_is_found_out(x_predictor: Agent, batch: Batch) -> None:
    wrapped = copy.deepcopy(x_predictor)

    def to_velocity(_module: object, args: tuple, output: DynamicsOutput) -> DynamicsOutput:
        noisy, signal_idx = args[:2]
        return dataclasses.replace(output, latents=(output.latents - noisy) / (1 - signal_idx / MAX_STEPS)[..., None, None])

    wrapped.dynamics.register_forward_hook(to_velocity)
    report, before = verify_x_prediction(wrapped, batch), verify_x_prediction(x_predictor, batch)
    assert not report.is_x_prediction and report.reads_as == "velocities", report.text()
    for now, then in zip(report.levels, before.levels, strict=True):  # as velocities they are as good as they were when implied
        assert now.velocity_error == pytest.approx(then.implied_velocity_error, rel=1e-3)


def test_a_fresh_network_has_learned_nothing_but_is_asked_for_clean_latents(batch: Batch) -> None:
    report = verify_x_prediction(fresh_agent(), batch)
    assert report.reads_as == "nothing clear" and not report.is_x_prediction and report.trains_x_prediction
    assert report.levels[-1].clean_error > 0.5


@pytest.mark.parametrize("asked", ["velocity", "noise"])
def test_a_loss_that_asks_for_something_else_is_found_out(
    x_predictor: Agent, batch: Batch, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OtherLoss(ShortcutForcingLoss):
        def corrupt(self, *args, **kwargs):
            c = super().corrupt(*args, **kwargs)
            tau = (c.signal_idx / self.max_steps)[..., None, None]
            noise = (c.noisy - tau * c.clean) / (1 - tau)
            return dataclasses.replace(c, clean=noise if asked == "noise" else c.clean - noise)

    monkeypatch.setattr(debug_phase1, "ShortcutForcingLoss", OtherLoss)
    report = verify_x_prediction(x_predictor, batch)
    assert not report.trains_x_prediction and not report.is_x_prediction and report.target_error > 0.5


def test_latents_that_are_all_the_same_prove_nothing(x_predictor: Agent, batch: Batch) -> None:
    with pytest.raises(ValueError, match="latents are all the same"):
        verify_x_prediction(x_predictor, dataclasses.replace(batch, latents=torch.ones_like(batch.latents)))
