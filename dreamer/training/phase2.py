"""Phase 2: agent finetuning. The dynamics goes on learning while policy, reward and continue heads join it (Dreamer 4, Eq. 9)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dreamer.data.alignment import mtp_targets
from dreamer.losses import LossNormalizer, ShortcutForcingConfig, ShortcutForcingLoss, behaviour_cloning_loss, continue_loss, reward_loss
from dreamer.models.agent import Agent
from dreamer.ops.shares import holds_any
from dreamer.training.lengths import SequenceConfig
from dreamer.training.loop import Phase, TrainConfig
from dreamer.training.phase1 import shortcut_step
from dreamer.types import Batch, Config


class AgentLossConfig(Config):
    dynamics_weight: float = Field(default=1.0, ge=0)
    policy_weight: float = Field(default=1.0, ge=0)
    reward_weight: float = Field(default=1.0, ge=0)
    continue_weight: float = Field(default=1.0, ge=0)
    normalize_losses: bool = True  # divide each term by a running estimate of its root mean square


class RelevantConfig(Config):
    """Which episodes reach the task: behaviour cloning learns from these."""

    fraction: float = Field(default=0.5, gt=0, le=1)  # of the rows of a batch
    return_quantile: float = Field(default=0.5, ge=0, lt=1)  # relevant: episodes whose return is at or above this quantile


class Phase2Config(SequenceConfig):
    train: TrainConfig = TrainConfig()
    shortcut: ShortcutForcingConfig = ShortcutForcingConfig()
    loss: AgentLossConfig = AgentLossConfig()
    relevant: RelevantConfig = RelevantConfig()

    @model_validator(mode="after")
    def _policy_has_rows(self) -> Phase2Config:
        if round(self.relevant.fraction * self.train.batch_size) == 0:
            raise ValueError(
                f"relevant.fraction is {self.relevant.fraction} of train.batch_size = {self.train.batch_size}: no row would teach the "
                "policy; enlarge one of them"
            )
        if self.relevant.fraction == 1 and self.shortcut.heads_context_fraction is not None:
            raise ValueError(
                "relevant.fraction is 1 and shortcut.heads_context_fraction is set: it is for rows that teach the heads alone, and without "
                "uniform rows all teach the dynamics too; set one of them otherwise"
            )
        return self


def relevant_episodes(
    returns: Float[np.ndarray, " n"], has_rewards: Bool[np.ndarray, " n"], episodes: Int[np.ndarray, " k"], config: RelevantConfig
) -> Int[np.ndarray, " r"]:
    """Those of ``episodes`` whose return is at or above the quantile of their returns; never the worst ones, if returns differ.

    An episode whose rewards are not known is never relevant, unless none is known: then there is nothing to choose by, and all are.
    """
    if has_rewards[episodes].any():
        episodes = episodes[has_rewards[episodes]]
    own = returns[episodes]
    limit = np.quantile(own, config.return_quantile)
    if limit <= own.min() < own.max():
        return episodes[own > own.min()]
    return episodes[own >= limit]


class Phase2(Phase):
    """``forward(batch, step, generator) -> (loss, metrics)``.

    Behaviour cloning learns from the relevant rows only, the dynamics from the uniform rows only (from all where there are none);
    reward and continue from all whose rewards are known. Rows that stand as single frames teach no head.
    """

    model: Agent
    leaves_out = False

    def __init__(self, agent: Agent, shortcut: ShortcutForcingConfig, config: AgentLossConfig) -> None:
        super().__init__()
        self.model, self.config = agent, config
        self.loss = ShortcutForcingLoss(shortcut, agent.config.dynamics.max_steps)
        self.normalizer = LossNormalizer(("dynamics", "policy", "reward", "continue"))
        agent.requires_grad_(False)
        for module in (agent.dynamics, agent.policy, agent.reward, agent.continue_):
            module.requires_grad_(True)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        # relevant rows first (as ``batches`` gives them): bootstrap rows come last, and only uniform rows are worth their two extra passes
        batch = batch[torch.argsort(batch.is_relevant.long(), descending=True, stable=True)]
        rows = ~batch.is_relevant | ~holds_any(~batch.is_relevant)
        dynamics_loss, metrics, output, no_history = shortcut_step(self.model.dynamics, self.loss, batch, generator, batch.task, rows=rows)
        assert output.features is not None
        terms = {"dynamics": (dynamics_loss, rows), **self._head_losses(batch, output.features, ~no_history)}
        weights = {
            "dynamics": config.dynamics_weight,
            "policy": config.policy_weight,
            "reward": config.reward_weight,
            "continue": config.continue_weight,
        }
        total = torch.zeros((), device=batch.latents.device)
        for name, (term, counted) in terms.items():
            has_rows = bool(holds_any(counted))
            if has_rows:  # a mean of nothing is left out
                metrics[f"{name}_loss"] = term.detach()
            total = total + weights[name] * (self.normalizer(name, term, has_rows) if config.normalize_losses else term)
        return total, metrics

    def _head_losses(self, batch: Batch, features: Tensor, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Each head's loss, and the mask of what counts in it."""
        heads, agent = self.model.config.heads, self.model
        distances = heads.num_distances
        actions, in_window = mtp_targets(batch.actions, distances)
        known, _ = mtp_targets(batch.action_mask, distances)
        rewards, _ = mtp_targets(batch.rewards, distances)
        terminals, _ = mtp_targets(batch.terminals, distances)
        in_window = in_window & rows[:, None, None]
        relevant = batch.is_relevant[:, None, None]
        rewarded = in_window & batch.has_rewards[:, None, None]
        policy_mask = (known & in_window[..., None]) & relevant[..., None]
        return {
            "policy": (behaviour_cloning_loss(agent.policy(features).log_prob(actions), policy_mask), policy_mask),
            "reward": (reward_loss(agent.reward(features), rewards, rewarded, heads.bin_range), rewarded),
            "continue": (continue_loss(agent.continue_(features), terminals, rewarded), rewarded),
        }
