"""Optimisers: who gets Muon, the schedule, and state that survives safetensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dreamer.training.optim import OptimConfig, learning_rate_scale, load_optimizer_tensors, make_optimizers, optimizer_tensors


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"transformer.layers.0.attention.qkv.weight": (6, 4), "transformer.layers.0.norm.weight": (4,), "latent_in.weight": (4, 3)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def step(own: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in own.values():
        p.grad = torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest() -> None:
    own = parameters()
    muon, adamw = make_optimizers(own, OptimConfig(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(6, 4)]
    assert len(adamw.param_groups[0]["params"]) == 2
    (only,) = make_optimizers(own, OptimConfig())
    assert len(only.param_groups[0]["params"]) == 3


def test_the_schedule_by_hand() -> None:
    config = OptimConfig(warmup_steps=4, decay_fraction=0.5, final_scale=0.1)
    scales = [learning_rate_scale(step, 20, config) for step in range(20)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scales[5:11] == pytest.approx([1.0] * 6)
    assert scales[15] == pytest.approx(0.1 + 0.9 * 0.5) and scales[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert learning_rate_scale(0, 10, OptimConfig(warmup_steps=0)) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_through_tensors_unchanged(optimizer: Any) -> None:
    config = OptimConfig(optimizer=optimizer)
    whole = parameters()
    optimizers = make_optimizers(whole, config)
    for seed in range(6):
        step(whole, optimizers, seed)
    parts = parameters()
    first = make_optimizers(parts, config)
    for seed in range(3):
        step(parts, first, seed)
    second = make_optimizers(parts, config)
    load_optimizer_tensors(second, optimizer_tensors(first))
    for seed in range(3, 6):
        step(parts, second, seed)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
