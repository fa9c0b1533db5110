"""Cosmos networks of reduced width with random weights, tokenizers around them, and clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer.models import CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.causal_tokenizer import to_signed, to_uint8

NATIVE = {"frame_size": (16, 16), "upsampled_size": (16, 16), "spatial_mode": "none"}


def _wrap(network: Any, **settings: Any) -> CosmosTokenizerWrapper:
    return CosmosTokenizerWrapper(CosmosTokenizerConfig(enabled=True, **(NATIVE | settings)), network)


def _clip(length: int, size: int = 16, batch: int = 1) -> Tensor:
    """Noise that drifts, so that neighbouring frames resemble each other."""
    noise = torch.randn(batch, length, 3, size, size).cumsum(1)
    return to_uint8(torch.tanh(noise / 4))


def _signed(frames: Tensor) -> Tensor:
    """Pixels as the network takes them: B C F H W in [-1, 1]."""
    return to_signed(frames).transpose(1, 2)


def _raw_encode(network: Any, frames: Tensor) -> Tensor:
    """Latents as the network gives them, B Z T Y X: not normalised."""
    with torch.no_grad():
        return network.encode(_signed(frames)).latent_dist.mode()


@pytest.fixture
def make_network(small_cosmos: Callable[..., Any]) -> Callable[..., Any]:
    return small_cosmos


@pytest.fixture(scope="session")
def network(small_cosmos: Callable[..., Any]) -> Any:
    """diffusers' AutoencoderKLCosmos, shared: no test changes it."""
    return small_cosmos()


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


@pytest.fixture(scope="session")
def signed() -> Callable[[Tensor], Tensor]:
    return _signed


@pytest.fixture(scope="session")
def raw_encode() -> Callable[[Any, Tensor], Tensor]:
    return _raw_encode
