"""Phase 1: the world model learns to denoise latents, given actions (Dreamer 4, Eq. 7). Trains the dynamics alone."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from pydantic import model_validator
from torch import Tensor

from dreamer.losses.shortcut_loss import ShortcutForcingConfig, ShortcutForcingLoss
from dreamer.models.agent import Agent
from dreamer.models.dynamics import Dynamics, DynamicsOutput
from dreamer.ops.shares import own_rows, total, whole_size
from dreamer.training.lengths import SequenceConfig
from dreamer.training.loop import Phase, TrainConfig
from dreamer.types import Batch


class Phase1Config(SequenceConfig):
    train: TrainConfig = TrainConfig()
    shortcut: ShortcutForcingConfig = ShortcutForcingConfig()

    @model_validator(mode="after")
    def _no_heads(self) -> Phase1Config:
        if self.shortcut.heads_context_fraction is not None:
            raise ValueError("shortcut.heads_context_fraction is for phase 2: no heads learn in phase 1; set phase2.shortcut instead")
        return self


def draw_no_history(batch_size: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Which rows are trained as separate single frames: each with probability ``fraction``."""
    return own_rows(torch.rand(whole_size(batch_size), generator=generator, device=generator.device)) < fraction


def shortcut_step(
    dynamics: Dynamics,
    loss: ShortcutForcingLoss,
    batch: Batch,
    generator: torch.Generator,
    task: Int[Tensor, " B"] | None = None,
    *,
    rows: Bool[Tensor, " B"] | None = None,
) -> tuple[Tensor, dict[str, Tensor], DynamicsOutput, Tensor]:
    """One forward pass over a corrupted batch: loss, metrics, output, and which rows had no history.

    Only ``rows`` count in the loss (default: all); they must come last, where the bootstrap rows are.
    """
    corrupted = loss.corrupt(batch.latents, generator, None if rows is None else int(total(rows.sum())))
    no_history = draw_no_history(len(batch.latents), loss.config.independent_fraction, generator)

    def denoise(noisy: Tensor, signal_idx: Tensor, step_idx: Tensor) -> Tensor:
        last = slice(len(batch.latents) - len(noisy), None)
        actions, known = batch.prev_actions[last], batch.prev_action_mask[last]
        return dynamics(noisy, signal_idx, step_idx, actions, known, no_history=no_history[last]).latents

    output = dynamics(
        corrupted.noisy, corrupted.signal_idx, corrupted.step_idx, batch.prev_actions, batch.prev_action_mask, task, no_history=no_history
    )
    value, metrics = loss(output.latents, corrupted, denoise, rows)
    return value, metrics, output, no_history


class Phase1(Phase):
    """``forward(batch, step, generator) -> (loss, metrics)`` for the training loop."""

    model: Agent

    def __init__(self, agent: Agent, config: ShortcutForcingConfig) -> None:
        super().__init__()
        self.model = agent
        self.loss = ShortcutForcingLoss(config, agent.config.dynamics.max_steps)
        agent.requires_grad_(False)
        agent.dynamics.requires_grad_(True)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics, *_ = shortcut_step(self.model.dynamics, self.loss, batch, generator)
        return loss, metrics
