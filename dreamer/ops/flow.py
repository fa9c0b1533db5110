"""Signal levels, noising and the way between x-prediction and velocity (Dreamer 4, Section 3.2).

``tau`` is the signal level: 0 is pure noise, 1 is clean. ``d`` is the step size. Both live on grids: with ``K = max_steps``
(a power of two), ``tau = signal_idx / K`` and ``d = 2 ** -step_idx``, ``step_idx`` in [0, log2 K]; the last is ``d_min = 1 / K``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def num_step_sizes(max_steps: int) -> int:
    """How many step sizes 1, 1/2, ..., 1/max_steps there are. ``ValueError`` unless ``max_steps`` is a power of two."""
    if max_steps < 1 or max_steps & (max_steps - 1):
        raise ValueError(f"max_steps is {max_steps}; expected a power of two, such as 64")
    return max_steps.bit_length()


def step_size(step_idx: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """d = 2 ** -step_idx."""
    return torch.exp2(-step_idx.float())


def signal_index(signal: float, max_steps: int) -> int:
    """The grid index nearest to the signal level ``signal`` in [0, 1); 1 itself is not on the grid (tau <= 1 - d_min)."""
    return min(round(signal * max_steps), max_steps - 1)


def sample_signal_idx(step_idx: Int[Tensor, "*S"], max_steps: int, generator: torch.Generator | None = None) -> Int[Tensor, "*S"]:
    """tau uniform on {0, d, 2d, ..., 1 - d} for each entry's own d, as an index in units of 1 / max_steps."""
    num_levels = torch.exp2(step_idx.float())  # 1 / d
    uniform = torch.rand(step_idx.shape, generator=generator, device=step_idx.device)
    level = torch.minimum((uniform * num_levels).floor(), num_levels - 1)  # rand can round up to 1
    return (level * (max_steps / num_levels)).long()


def _expand(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim)).to(like.dtype)


def add_noise(
    clean: Float[Tensor, "B T N Z"], noise: Float[Tensor, "B T N Z"], signal_level: Float[Tensor, "B T"]
) -> Float[Tensor, "B T N Z"]:
    """z~ = (1 - tau) z0 + tau z1, with z0 the noise and z1 the clean latents (Eq. 1)."""
    tau = _expand(signal_level, clean)
    return (1 - tau) * noise + tau * clean


def velocity(
    prediction: Float[Tensor, "B T N Z"], noisy: Float[Tensor, "B T N Z"], signal_level: Float[Tensor, "B T"]
) -> Float[Tensor, "B T N Z"]:
    """b = (z1^ - z~) / (1 - tau): the velocity that an x-prediction implies (Eq. 6). tau must be below 1."""
    return (prediction - noisy) / (1 - _expand(signal_level, noisy))


def euler_step(
    prediction: Float[Tensor, "B T N Z"],
    noisy: Float[Tensor, "B T N Z"],
    signal_level: Float[Tensor, "B T"],
    step: Float[Tensor, "B T"],
) -> Float[Tensor, "B T N Z"]:
    """z~ + b d: moves the noisy latents from signal level tau to tau + d along the predicted velocity."""
    return noisy + velocity(prediction, noisy, signal_level) * _expand(step, noisy)


def ramp_weight(signal_level: Float[Tensor, "*S"], floor: float = 0.1) -> Float[Tensor, "*S"]:
    """w(tau) = (1 - floor) tau + floor; the paper's floor of 0.1 gives 0.9 tau + 0.1 (Eq. 8): more capacity for the levels that
    hold more signal."""
    return (1 - floor) * signal_level + floor
