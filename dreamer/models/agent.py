"""The whole trainable agent: dynamics and the heads on its agent token."""

from __future__ import annotations

import copy

from torch import nn

from dreamer.models.dynamics import Dynamics, DynamicsConfig
from dreamer.models.heads import ContinueHead, HeadConfig, PolicyHead, ScalarHead
from dreamer.types import ActionSpace, Config


class AgentConfig(Config):
    dynamics: DynamicsConfig = DynamicsConfig()
    heads: HeadConfig = HeadConfig()


class Agent(nn.Module):
    """Phase 1 trains ``dynamics``; phase 2 also ``policy``, ``reward`` and ``continue_``; phase 3 only ``policy`` and ``value``."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        action_space: ActionSpace,
        token_grid: tuple[int, int],
        latent_channels: int,
        actions_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.config, self.action_space = config, action_space
        self.dynamics = Dynamics(
            config.dynamics,
            action_space=action_space,
            token_grid=token_grid,
            latent_channels=latent_channels,
            actions_per_step=actions_per_step,
        )
        width = config.dynamics.transformer.width
        self.policy = PolicyHead(action_space, width, config.heads, actions_per_step)
        self.reward = ScalarHead(width, config.heads, config.heads.num_distances)
        self.continue_ = ContinueHead(width, config.heads)
        self.value = ScalarHead(width, config.heads, num_distances=1)

    def prior(self) -> PolicyHead:
        """A frozen copy of the policy as it is now: the prior of phase 3."""
        prior = copy.deepcopy(self.policy)
        return prior.requires_grad_(False).eval()
