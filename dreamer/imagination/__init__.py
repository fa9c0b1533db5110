"""Dreams: the denoising loop, rollouts of a policy in it, the world model as an environment, and agents that act on real frames."""

from dreamer.imagination.policy import AgentPolicy
from dreamer.imagination.rollout import ImaginationRollout, RolloutConfig
from dreamer.imagination.sampler import Sampler, SamplerConfig, SamplerState
from dreamer.imagination.world_model_env import WorldModelEnv, WorldModelEnvConfig

__all__ = [
    "AgentPolicy",
    "ImaginationRollout",
    "RolloutConfig",
    "Sampler",
    "SamplerConfig",
    "SamplerState",
    "WorldModelEnv",
    "WorldModelEnvConfig",
]
