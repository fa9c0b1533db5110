"""Phase 3: policy and value heads learn in imagination (Dreamer 4, Eqs. 10 and 11). Everything else is frozen."""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dreamer.imagination.rollout import ImaginationRollout, RolloutConfig
from dreamer.losses import LossNormalizer, PMPOConfig, PMPOLoss, value_loss
from dreamer.models.agent import Agent
from dreamer.ops.returns import lambda_returns
from dreamer.ops.shares import mean
from dreamer.training.loop import Phase, TrainConfig
from dreamer.training.resume_checks import kind_of
from dreamer.types import Batch, Config, Trajectory


class ImaginationConfig(Config):
    rollout: RolloutConfig = RolloutConfig()
    pmpo: PMPOConfig = PMPOConfig()
    gamma: float = Field(default=0.997, gt=0, le=1)
    lambda_: float = Field(default=0.95, ge=0, le=1)
    updates_per_rollout: int = Field(default=1, ge=1)  # optimiser steps on one set of rollouts
    value_only_steps: int = Field(default=0, ge=0)  # first steps, in which only the value learns


class Phase3Config(Config):
    train: TrainConfig = TrainConfig()
    imagination: ImaginationConfig = ImaginationConfig()

    @model_validator(mode="after")
    def _one_trajectory_at_a_time(self) -> Phase3Config:
        if self.train.accumulate > 1 and self.imagination.updates_per_rollout > 1:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate} and imagination.updates_per_rollout {self.imagination.updates_per_rollout}; "
                "a rollout is kept for one batch at a time, so one of them must be 1"
            )
        return self


def freeze_world_model(agent: Agent, tokenizer: nn.Module | None = None) -> None:
    """Freeze the dynamics, the reward and continue heads, and the tokenizer where there is one: no gradient, eval mode.

    Policy and value stay trainable.
    """
    for module in (agent.dynamics, agent.reward, agent.continue_, *([] if tokenizer is None else [tokenizer])):
        module.requires_grad_(False)
        module.eval()


class Phase3(Phase):
    """``forward(batch, step, generator) -> (loss, metrics)``: imagines rollouts from the batch, then scores policy and value.

    The prior is the policy as it is now, when the phase begins; a resumed run gets it back from its checkpoint.
    """

    model: Agent

    def __init__(self, agent: Agent, config: ImaginationConfig) -> None:
        super().__init__()
        self.model, self.config = agent, config
        self.prior = agent.prior()
        self.rollout = ImaginationRollout(agent, config.rollout)
        self.pmpo = PMPOLoss(config.pmpo)
        self.normalizer = LossNormalizer(("value", "policy"))
        self.trajectory: Trajectory | None = None
        self.leaves_out = config.value_only_steps > 0
        freeze_world_model(agent)
        agent.policy.requires_grad_(True)
        agent.value.requires_grad_(True)

    def train(self, mode: bool = True) -> Phase3:
        super().train(mode)
        freeze_world_model(self.model)
        self.prior.eval()
        return self

    def carried(self) -> dict[str, Tensor]:
        if self.trajectory is None:
            return {}
        return {f.name: getattr(self.trajectory, f.name) for f in dataclasses.fields(self.trajectory)}

    def carry(self, tensors: dict[str, Tensor]) -> None:
        self.trajectory = Trajectory(**tensors) if tensors else None

    def check_carried(self, tensors: dict[str, Tensor], step: int) -> None:
        if not tensors and step % self.config.updates_per_rollout == 0:
            return  # the next step begins with another rollout
        agent, horizon = self.model, self.config.rollout.horizon
        dynamics = agent.dynamics
        sides = {
            "features": (horizon + 1, agent.config.dynamics.transformer.width),
            "actions": (horizon, dynamics.actions_per_step, agent.action_space.num_columns),
            "rewards": (horizon,),
            "continues": (horizon,),
            "latents": (horizon + 1, dynamics.token_grid[0] * dynamics.token_grid[1], dynamics.latent_channels),
            "has_ended": (),
        }
        for name in [*sides, *tensors]:
            if name not in tensors or name not in sides:
                known = ", ".join(sides)
                raise ValueError(f"{'lacks' if name in sides else 'holds'} 'carried.{name[:200]}'; expected the rollout's {known}")
        num_rows = len(tensors["features"])
        for name, tensor in tensors.items():
            dtypes = (torch.bool,) if name == "has_ended" else (torch.float32, torch.bfloat16)  # the latter: within autocast
            if tensor.dtype not in dtypes or tuple(tensor.shape) != (num_rows, *sides[name]) or num_rows == 0:
                expected = torch.empty(num_rows or 1, *sides[name], dtype=dtypes[0], device="meta")
                raise ValueError(f"'carried.{name}' is {kind_of(tensor)}; expected {kind_of(expected)}")

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if self.trajectory is None or step % self.config.updates_per_rollout == 0:
            self.trajectory = self.rollout(batch, generator)
        loss, metrics = self.score(self.trajectory, with_policy=step >= self.config.value_only_steps)
        return loss, metrics

    def score(self, trajectory: Trajectory, with_policy: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of imagined rollouts: TD(lambda) for the value, PMPO for the policy."""
        agent, config = self.model, self.config
        states = trajectory.features.detach()
        with torch.no_grad():
            values = agent.value.mean(states)
            returns = lambda_returns(trajectory.rewards, trajectory.continues, values, config.gamma, config.lambda_)
            advantages = returns - values[:, :-1]
            running = torch.cat([(~trajectory.has_ended).float()[:, None], trajectory.continues[:, :-1]], dim=1).cumprod(1)
        acting = states[:, :-1]
        value_term = value_loss(agent.value(acting)[..., 0, :], returns, running, agent.config.heads.bin_range)
        policy = agent.policy.now(acting)
        log_probs = policy.log_prob(trajectory.actions).sum(-1)
        kl = policy.kl(self.prior.now(acting)).sum(-1)
        policy_term, metrics = self.pmpo(log_probs, advantages, kl, running)
        metrics |= {
            "value_loss": value_term.detach(),
            "imagined_reward": mean(trajectory.rewards.sum(1)),
            "imagined_return": mean(returns[:, 0]),
            "value": mean(values),
            "entropy": mean(policy.entropy().sum(-1)).detach(),
        }
        loss = self.normalizer("value", value_term)
        return loss + self.normalizer("policy", policy_term) if with_policy else loss, metrics
