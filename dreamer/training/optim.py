"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor

from dreamer.types import Config

MUON_CANNOT = "optim.optimizer is muon, which needs whole matrices, and parallel.strategy fsdp cuts them; use adamw, or ddp"


class OptimConfig(Config):
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside transformer layers; AdamW for the rest
    learning_rate: float = Field(default=3e-4, gt=0)  # of AdamW
    muon_learning_rate: float = Field(default=0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    decay_fraction: float = Field(default=0.0, ge=0, le=1)  # the last share of the steps, over which the rate falls linearly
    final_scale: float = Field(default=0.02, gt=0, le=1)  # what it falls to


def make_optimizers(
    parameters: dict[str, nn.Parameter], config: OptimConfig, rate_factor: Callable[[str], float] = lambda name: 1.0
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden matrices of transformer layers and AdamW over the rest.

    ``rate_factor(name)`` multiplies the learning rate of one parameter.
    """

    def uses_muon(name: str, parameter: nn.Parameter) -> bool:
        return config.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name

    def groups(names: list[str], rate: float) -> list[dict[str, Any]]:
        factors = dict.fromkeys(map(rate_factor, names))
        return [{"params": [parameters[name] for name in names if rate_factor(name) == factor], "lr": rate * factor} for factor in factors]

    muon = [name for name, p in parameters.items() if uses_muon(name, p)]
    rest = [name for name, p in parameters.items() if not uses_muon(name, p)]
    if any(isinstance(parameters[name], DTensor) for name in muon):
        raise ValueError(MUON_CANNOT)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(torch.optim.Muon(groups(muon, config.muon_learning_rate), weight_decay=config.weight_decay))
    if rest:
        optimizers.append(torch.optim.AdamW(groups(rest, config.learning_rate), betas=config.betas, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then 1, then a linear fall to ``final_scale`` over the last ``decay_fraction`` of the steps."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay_steps = config.decay_fraction * total_steps
    left = min(1.0, (total_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * (config.final_scale + (1 - config.final_scale) * left)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The optimisers' state as named tensors, for safetensors. Hyperparameters come from the config, not from here."""
    tensors = {}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{i}.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def room_for_optimizer_tensors(optimizers: list[torch.optim.Optimizer], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors like these, as ``optimizer_tensors`` gives them. One of its parameter's shape is cut into pieces as it is."""
    parameters = _places(optimizers)
    room = {}
    for name, tensor in like.items():
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is not None and parameter.shape == tensor.shape:
            room[name] = torch.zeros_like(parameter.detach())
        else:
            room[name] = torch.zeros_like(tensor, device="cpu")
    return room


def moments_of_each(optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
    """For each parameter, tensors like those that ``optimizer_tensors`` gives once it has had a gradient."""
    names = {id(p): name for name, p in parameters.items()}
    found = {}
    for place, parameter in _places(optimizers).items():
        if isinstance(optimizers[int(place.partition(".")[0])], torch.optim.Muon):
            found[names[id(parameter)]] = {f"{place}.momentum_buffer": parameter}
        else:
            own = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            found[names[id(parameter)]] = {f"{place}.{key}": like for key, like in own.items()}
    return found


def without_moments(optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that no step has given a gradient so far: a phase may leave some out, for a while or for ever."""
    return [name for name, p in parameters.items() if not any(p in optimizer.state for optimizer in optimizers)]


def _places(optimizers: list[torch.optim.Optimizer]) -> dict[str, nn.Parameter]:
    """Each parameter by the optimiser's number and its own in there, as ``optimizer_tensors`` names them."""
    return {
        f"{i}.{index}": parameter
        for i, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }


def load_optimizer_tensors(optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            which, index, key = name.split(".", 2)
            if int(which) == i:
                state.setdefault(int(index), {})[key] = value.clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
