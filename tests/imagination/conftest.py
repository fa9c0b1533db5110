"""Small agents and clips to dream from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamer.models import (
    Agent,
    AgentConfig,
    CosmosTokenizerConfig,
    CosmosTokenizerWrapper,
    DynamicsConfig,
    HeadConfig,
    TransformerConfig,
)
from dreamer.models.cosmos_weights import build_network
from dreamer.types import ActionComponent, ActionSpace, Batch

SPACE = ActionSpace((ActionComponent("move", "categorical", 5), ActionComponent("jump", "binary", 1)))
TOKENS, CHANNELS = 4, 3


def _agent(slots: int = 1, context_length: int = 6, max_steps: int = 8, channels: int = CHANNELS, space: ActionSpace = SPACE) -> Agent:
    transformer = TransformerConfig(width=16, num_layers=4, num_heads=2, num_kv_heads=1, time_every=2, context_length=context_length)
    config = AgentConfig(
        dynamics=DynamicsConfig(transformer=transformer, num_registers=1, max_steps=max_steps, num_tasks=2),
        heads=HeadConfig(hidden=16, num_distances=2, num_bins=21, bin_range=3.0),
    )
    agent = Agent(config, action_space=space, token_grid=(2, 2), latent_channels=channels, actions_per_step=slots).eval()
    for head in (agent.policy, agent.reward, agent.continue_, agent.value):  # heads start at zero, where nothing shows
        nn.init.normal_(head.mlp.out.weight)
    return agent


def _actions(batch: int, time: int, slots: int) -> Tensor:
    return torch.cat([torch.randint(0, 5, (batch, time, slots, 1)), torch.randint(0, 2, (batch, time, slots, 1))], dim=-1).float()


def _batch(batch: int = 2, time: int = 6, slots: int = 1, channels: int = CHANNELS) -> Batch:
    known = torch.ones(batch, time, slots, dtype=torch.bool)
    known[:, 0] = False
    return Batch(
        latents=torch.randn(batch, time, TOKENS, channels),
        prev_actions=_actions(batch, time, slots),
        prev_action_mask=known,
        actions=_actions(batch, time, slots),
        action_mask=torch.ones(batch, time, slots, dtype=torch.bool),
        rewards=torch.zeros(batch, time),
        terminals=torch.zeros(batch, time, dtype=torch.bool),
        task=torch.zeros(batch, dtype=torch.long),
        has_rewards=torch.ones(batch, dtype=torch.bool),
        is_relevant=torch.zeros(batch, dtype=torch.bool),
    )


@pytest.fixture
def make_agent() -> Callable[..., Agent]:
    return _agent


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return _batch


@pytest.fixture
def make_generator() -> Callable[[int], torch.Generator]:
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def make_cosmos() -> Callable[..., CosmosTokenizerWrapper]:
    """The Cosmos tokenizer, narrow and with random weights, for 16x16 frames: 4 tokens of 16 channels, 8 frames a latent step."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    torch.manual_seed(0)
    widths = (8, 12, 16, 20)
    network = build_network({"encoder_block_out_channels": widths, "decode_block_out_channels": widths, "num_layers": 1})
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)  # so that what is far in space and time still shows
        network.decoder.conv_out.conv_t.weight.mul_(0.1)  # pixels of about [-1, 1]

    def make(**settings: Any) -> CosmosTokenizerWrapper:
        native = {"frame_size": (16, 16), "upsampled_size": (16, 16), "spatial_mode": "none"}
        tokenizer = CosmosTokenizerWrapper(CosmosTokenizerConfig(enabled=True, **(native | settings)), network)
        frames = torch.randint(0, 256, (8, 17, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        latents = tokenizer.encode_positions(frames)
        for row, part in enumerate((latents[:, :, :1], latents[:, :, 1:])):  # the published statistics are not those of this network
            by_channel = part.transpose(0, 1).flatten(1)
            tokenizer.latent_mean[row] += by_channel.mean(1) * tokenizer.latent_std[row]
            tokenizer.latent_std[row] *= by_channel.std(1)
        return tokenizer

    return make
