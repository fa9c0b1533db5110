"""Imagined rollouts: the policy acts, the dynamics dreams, the heads say what it was worth (Dreamer 4, Section 3.3)."""

from __future__ import annotations

import torch
from pydantic import Field

from dreamer.imagination.sampler import Sampler, SamplerConfig
from dreamer.models.agent import Agent
from dreamer.types import Batch, Config, Trajectory


class RolloutConfig(Config):
    horizon: int = Field(default=15, ge=1)  # R imagined steps
    context: int = Field(default=8, ge=1)  # recorded latent steps before the dream starts
    sampler: SamplerConfig = SamplerConfig()


class ImaginationRollout:
    """One rollout per row of a batch, from its first ``context`` steps. Nothing here carries gradient."""

    def __init__(self, agent: Agent, config: RolloutConfig) -> None:
        if config.context > agent.config.dynamics.transformer.context_length:
            raise ValueError(
                f"rollout.context is {config.context}; the dynamics sees at most {agent.config.dynamics.transformer.context_length} steps"
            )
        self.agent, self.config = agent, config
        self.sampler = Sampler(agent.dynamics, config.sampler)

    @torch.no_grad()
    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Trajectory:
        """States s_0 .. s_R (s_0 is the last context step), the actions sampled in s_0 .. s_{R-1}, and the reward and
        continue probability predicted in s_1 .. s_R."""
        context = self.config.context
        if batch.latents.shape[1] < context:
            raise ValueError(f"the batch holds {batch.latents.shape[1]} steps; rollout.context needs {context}")
        agent, state = self.agent, self.sampler.start(batch.latents.shape[0], task=batch.task, generator=generator)
        past = (x[:, :context] for x in (batch.latents, batch.prev_actions, batch.prev_action_mask))
        features, latents, actions = [self.sampler.observe(state, *past)[:, -1]], [batch.latents[:, context - 1]], []
        for _ in range(self.config.horizon):
            actions.append(agent.policy.now(features[-1]).sample(generator))
            next_latents, next_features = self.sampler.imagine(state, actions[-1])
            latents.append(next_latents)
            features.append(next_features)
        states = torch.stack(features, dim=1)
        return Trajectory(
            features=states,
            actions=torch.stack(actions, dim=1),
            rewards=agent.reward.mean(states[:, 1:]),
            continues=agent.continue_.mean(states[:, 1:]),
            latents=torch.stack(latents, dim=1),
            has_ended=batch.terminals[:, context - 1],
        )
