"""Cosmos networks of reduced width with random weights, tokenizers around them, and clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer.models import CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.causal_tokenizer import to_uint8
from dreamer.models.cosmos_weights import build_network

WIDTHS = {"encoder_block_out_channels": (8, 12, 16, 20), "decode_block_out_channels": (8, 12, 16, 20), "num_layers": 1}
NATIVE = {"frame_size": (16, 16), "upsampled_size": (16, 16), "spatial_mode": "none"}


def _small_network(**changes: Any) -> Any:
    """diffusers' network, narrow; its weights are scaled up so that what is far in space and time still shows in the output."""
    torch.manual_seed(0)
    network = build_network(WIDTHS | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        network.decoder.conv_out.conv_t.weight.mul_(0.1)  # pixels of about [-1, 1]
    return network


def _wrap(network: Any, **settings: Any) -> CosmosTokenizerWrapper:
    return CosmosTokenizerWrapper(CosmosTokenizerConfig(enabled=True, **(NATIVE | settings)), network)


def _clip(length: int, size: int = 16, batch: int = 1) -> Tensor:
    """Noise that drifts, so that neighbouring frames resemble each other."""
    noise = torch.randn(batch, length, 3, size, size).cumsum(1)
    return to_uint8(torch.tanh(noise / 4))


@pytest.fixture
def make_network() -> Callable[..., Any]:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    return _small_network


@pytest.fixture(scope="session")
def network() -> Any:
    """diffusers' AutoencoderKLCosmos, shared: no test changes it."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    return _small_network()


@pytest.fixture(scope="session")
def native() -> dict[str, Any]:
    """Settings: 16x16 frames as they are, all of the 2x2 positions."""
    return NATIVE


@pytest.fixture(scope="session")
def wrap() -> Callable[..., CosmosTokenizerWrapper]:
    return _wrap


@pytest.fixture(scope="session")
def clip() -> Callable[..., Tensor]:
    return _clip
