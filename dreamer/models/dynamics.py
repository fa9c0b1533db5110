"""The interactive dynamics: a transformer that denoises the latents of every time step, given actions (Dreamer 4, Section 3.2).

Shape letters: B batch, T latent steps, P actions per latent step, A action columns, N spatial tokens, Z latent channels, D width,
S all tokens of a step's block: [action, signal and step, N spatial, registers, agent].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from dreamer.models.transformer import TimeCache, Transformer, TransformerConfig, grid_angles
from dreamer.ops.flow import num_step_sizes
from dreamer.types import ActionSpace, Config


class DynamicsConfig(Config):
    transformer: TransformerConfig = TransformerConfig()
    num_registers: int = Field(default=4, ge=0)
    max_steps: int = Field(default=64, ge=2)  # K_max: the finest step size is 1 / K_max
    num_tasks: int = Field(default=1, ge=1)

    @field_validator("max_steps")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        num_step_sizes(value)
        return value


@dataclass(frozen=True)
class DynamicsOutput:
    """``latents``: the prediction of the clean latents. ``features``: the agent token's output, None without an agent token."""

    latents: Float[Tensor, "B T N Z"]
    features: Float[Tensor, "B T D"] | None


class ActionEmbedding(nn.Module):
    """One token per step: a learned base plus, where the action is known, the sum of its components' embeddings.

    An unknown action (an episode's first step, unlabelled video) is the base alone. With P > 1 actions per step, each slot is
    embedded, unknown slots by a learned null, and an MLP joins them.
    """

    def __init__(self, space: ActionSpace, width: int, actions_per_step: int) -> None:
        super().__init__()
        self.space = space
        self.actions_per_step = actions_per_step
        self.base = nn.Parameter(torch.randn(width) * 0.02)
        self.components = nn.ModuleList()  # not a ModuleDict: names such as "hotbar.1" or "keys" cannot be keys there
        for component in space.components:
            if component.kind == "categorical":
                self.components.append(nn.Embedding(component.size, width))
            else:
                self.components.append(nn.Linear(component.size, width, bias=False))
        if actions_per_step > 1:
            self.null = nn.Parameter(torch.randn(actions_per_step, width) * 0.02)
            self.join = nn.Sequential(nn.Linear(actions_per_step * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, actions: Float[Tensor, "B T P A"], known: Bool[Tensor, "B T P"]) -> Float[Tensor, "B T D"]:
        if actions.shape[2:] != (self.actions_per_step, self.space.num_columns):
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}; expected (B, T, {self.actions_per_step}, {self.space.num_columns})"
            )
        actions = actions.masked_fill(~known.unsqueeze(-1), 0.0)  # what is not known is not read, whatever stands there
        embedded = torch.zeros((), device=actions.device)
        for layer, (component, columns) in zip(self.components, self.space.slices(), strict=True):
            values = actions[..., columns]
            if component.kind == "continuous":  # as the policy sees it: on [-1, 1], whatever the units
                values = 2 * (values - component.low) / (component.high - component.low) - 1
            embedded = embedded + (layer(values[..., 0].long()) if component.kind == "categorical" else layer(values))
        if self.actions_per_step == 1:
            return self.base + embedded[:, :, 0] * known.to(embedded.dtype)
        embedded = torch.where(known.unsqueeze(-1), embedded, self.null)
        joined = self.join(rearrange(embedded, "b t p d -> b t (p d)"))
        return self.base + joined * known.any(-1, keepdim=True).to(joined.dtype)


class Dynamics(nn.Module):
    """Predicts clean latents z1^ = f(z~, tau, d, actions): x-prediction, never a velocity, and unbounded (no tanh)."""

    def __init__(
        self,
        config: DynamicsConfig,
        *,
        action_space: ActionSpace,
        token_grid: tuple[int, int],
        latent_channels: int,
        actions_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.token_grid, self.latent_channels, self.actions_per_step = token_grid, latent_channels, actions_per_step
        self.num_spatial = token_grid[0] * token_grid[1]
        self.action_embedding = ActionEmbedding(action_space, width, actions_per_step)
        self.signal_embedding = nn.Embedding(config.max_steps, width // 2)
        self.step_embedding = nn.Embedding(num_step_sizes(config.max_steps), width - width // 2)
        self.latent_in = nn.Linear(latent_channels, width)
        self.spatial_position = nn.Parameter(torch.randn(self.num_spatial, width) * 0.02)
        self.registers = nn.Parameter(torch.randn(config.num_registers, width) * 0.02)
        self.agent_token = nn.Parameter(torch.randn(width) * 0.02)
        self.task_embedding = nn.Embedding(config.num_tasks, width)
        self.latent_out = nn.Linear(width, latent_channels)
        nn.init.normal_(self.task_embedding.weight, std=0.02)
        half = config.transformer.head_width // 2
        no_place = torch.zeros(1, half, dtype=torch.float64)
        angles = [
            no_place,
            no_place,
            grid_angles(token_grid, config.transformer.head_width),
            no_place.expand(config.num_registers + 1, half),
        ]
        self.transformer = Transformer(config.transformer, torch.cat(angles))

    @property
    def device(self) -> torch.device:
        return self.agent_token.device

    @property
    def num_tokens(self) -> int:
        """S, with the agent token."""
        return 2 + self.num_spatial + self.config.num_registers + 1

    def new_cache(self, batch_size: int) -> TimeCache:
        """A cache for runs with an agent token."""
        return self.transformer.new_cache(batch_size, self.num_tokens)

    def forward(
        self,
        noisy: Float[Tensor, "B T N Z"],
        signal_idx: Int[Tensor, "B T"],
        step_idx: Int[Tensor, "B T"],
        prev_actions: Float[Tensor, "B T P A"],
        prev_action_mask: Bool[Tensor, "B T P"],
        task: Int[Tensor, " B"] | None = None,
        *,
        no_history: Bool[Tensor, " B"] | None = None,
        cache: TimeCache | None = None,
        write: bool = False,
    ) -> DynamicsOutput:
        """``signal_idx`` in units of 1 / max_steps, ``step_idx`` as the exponent of d = 2 ** -step_idx.

        ``prev_actions[:, t]`` led into step t; where ``prev_action_mask`` is False the action is unknown and its value is not
        read. With ``task`` an agent token is added and ``features`` returned. ``no_history`` marks rows whose steps are
        separate images (no past, no action).
        """
        batch, time = noisy.shape[:2]
        if noisy.shape[2:] != (self.num_spatial, self.latent_channels):
            raise ValueError(f"latents have shape {tuple(noisy.shape)}; expected (B, T, {self.num_spatial}, {self.latent_channels})")
        if no_history is not None:
            prev_action_mask = prev_action_mask & ~rearrange(no_history, "b -> b 1 1")
        spatial = self.latent_in(noisy) + self.spatial_position
        action = self.action_embedding(prev_actions, prev_action_mask).to(spatial.dtype)
        level = torch.cat([self.signal_embedding(signal_idx), self.step_embedding(step_idx)], dim=-1).to(spatial.dtype)
        parts = [
            action.unsqueeze(2),
            level.unsqueeze(2),
            spatial,
            self.registers.to(spatial.dtype).expand(batch, time, -1, -1),
        ]
        if task is not None:
            agent = self.agent_token + self.task_embedding(task)
            parts.append(agent.to(spatial.dtype)[:, None, None].expand(-1, time, -1, -1))
        hidden = self.transformer(torch.cat(parts, dim=2), num_agent=int(task is not None), no_history=no_history, cache=cache, write=write)
        latents = self.latent_out(hidden[:, :, 2 : 2 + self.num_spatial])
        return DynamicsOutput(latents.float(), None if task is None else hidden[:, :, -1].float())
