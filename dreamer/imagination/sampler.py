"""The denoising loop, and the only one: turns actions into latents, a step at a time, with a key/value cache.

Shape letters: B batch, T latent steps, R steps to generate, P actions per step, A action columns, N tokens, Z channels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from dreamer.models.dynamics import Dynamics
from dreamer.models.transformer import TimeCache, compile_passes
from dreamer.ops import flow
from dreamer.ops.shares import own_rows, whole_size
from dreamer.types import Config


class SamplerConfig(Config):
    num_steps: int = Field(default=4, ge=1)  # K: denoising steps a latent step, each of d = 1 / K; a power of two
    compile: bool = False  # the transformer, by torch.compile: a dream of a minute and more is the faster for it
    context_signal: float = Field(default=0.9, gt=0, lt=1)  # past steps are shown at this signal level (the paper's 0.1 is the noise)

    @field_validator("num_steps")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"num_steps is {value}; expected a power of two, such as 4")
        return value


@dataclass
class SamplerState:
    """A running dream: the cache of B videos and the noise source."""

    cache: TimeCache
    generator: torch.Generator | None
    task: Int[Tensor, " B"]


class Sampler:
    """Runs a dynamics model forward in time.

    ``observe`` takes in clean latents (of recorded or real frames), ``imagine`` makes the next ones from pure noise in K steps.
    Both end by committing the clean latents to the cache at the context's signal level, which also gives the agent token's
    output for the new step. Cost and memory a step do not depend on how many came before.
    """

    def __init__(self, dynamics: Dynamics, config: SamplerConfig) -> None:
        max_steps = dynamics.config.max_steps
        if flow.num_step_sizes(config.num_steps) > flow.num_step_sizes(max_steps):
            raise ValueError(f"sampler.num_steps is {config.num_steps}; the dynamics was trained for at most {max_steps}")
        self.dynamics, self.config = dynamics, config
        if config.compile:
            compile_passes(dynamics.transformer)
        self.context_idx = flow.signal_index(config.context_signal, max_steps)

    def start(self, batch_size: int, *, task: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None) -> SamplerState:
        """A dream without a past. ``generator`` must live on the model's device."""
        device = self.dynamics.device
        task = torch.zeros(batch_size, dtype=torch.long, device=device) if task is None else task
        return SamplerState(self.dynamics.new_cache(batch_size), generator, task)

    def observe(
        self,
        state: SamplerState,
        latents: Float[Tensor, "B T N Z"],
        prev_actions: Float[Tensor, "B T P A"],
        prev_action_mask: Bool[Tensor, "B T P"],
    ) -> Float[Tensor, "B T D"]:
        """Take in T clean latent steps; returns the agent token's outputs. T may not exceed the context length."""
        with torch.inference_mode():
            features = self._commit(state, latents, prev_actions, prev_action_mask)
        return features.clone()  # an ordinary tensor, which may be learned on

    def _commit(self, state: SamplerState, latents: Tensor, prev_actions: Tensor, prev_action_mask: Tensor) -> Tensor:
        tau_idx = torch.full(latents.shape[:2], self.context_idx, device=latents.device)
        noise = self._noise(latents, state)
        noisy = flow.add_noise(latents, noise, tau_idx / self.dynamics.config.max_steps)
        finest = torch.full_like(tau_idx, flow.num_step_sizes(self.dynamics.config.max_steps) - 1)
        output = self.dynamics(noisy, tau_idx, finest, prev_actions, prev_action_mask, state.task, cache=state.cache, write=True)
        assert output.features is not None
        return output.features

    def imagine(
        self, state: SamplerState, prev_actions: Float[Tensor, "B P A"], prev_action_mask: Bool[Tensor, "B P"] | None = None
    ) -> tuple[Float[Tensor, "B N Z"], Float[Tensor, "B D"]]:
        """The next latent step, which ``prev_actions`` led into, and the agent token's output there."""
        with torch.inference_mode():
            latents, features = self._denoise(state, prev_actions, prev_action_mask)
        return latents[:, 0].clone(), features[:, 0].clone()

    def _denoise(self, state: SamplerState, prev_actions: Tensor, prev_action_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = prev_actions.shape[0]
        device, max_steps = prev_actions.device, self.dynamics.config.max_steps
        actions = prev_actions.unsqueeze(1)
        mask = torch.ones(actions.shape[:3], dtype=torch.bool, device=device) if prev_action_mask is None else prev_action_mask.unsqueeze(1)
        shape = (batch, 1, self.dynamics.num_spatial, self.dynamics.latent_channels)
        latents = self._noise(torch.empty(shape, device=device), state)
        step_idx = torch.full((batch, 1), flow.num_step_sizes(self.config.num_steps) - 1, device=device)
        for k in range(self.config.num_steps):
            signal_idx = torch.full((batch, 1), k * max_steps // self.config.num_steps, device=device)
            # nothing reads the agent token, so the denoising passes leave it out
            prediction = self.dynamics(latents, signal_idx, step_idx, actions, mask, cache=state.cache).latents
            latents = flow.euler_step(prediction, latents, signal_idx / max_steps, flow.step_size(step_idx))
        return latents, self._commit(state, latents, actions, mask)

    def generate(
        self,
        latents: Float[Tensor, "B T N Z"],
        prev_actions: Float[Tensor, "B TR P A"],
        prev_action_mask: Bool[Tensor, "B TR P"],
        *,
        task: Int[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B R N Z"]:
        """Continue T context steps open loop with the actions of all T + R steps; returns the R imagined ones."""
        context = latents.shape[1]
        if prev_actions.shape[1] <= context:
            raise ValueError(f"prev_actions holds {prev_actions.shape[1]} steps; expected more than the {context} of the context")
        state = self.start(latents.shape[0], task=task, generator=generator)
        self.observe(state, latents, prev_actions[:, :context], prev_action_mask[:, :context])
        steps = range(context, prev_actions.shape[1])
        return torch.stack([self.imagine(state, prev_actions[:, t], prev_action_mask[:, t])[0] for t in steps], dim=1)

    @staticmethod
    def _noise(like: Tensor, state: SamplerState) -> Tensor:
        shape = (whole_size(len(like)), *like.shape[1:])
        return own_rows(torch.randn(shape, generator=state.generator, device=like.device, dtype=like.dtype))
