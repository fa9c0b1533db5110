"""Shortcut forcing (Dreamer 4, Eq. 7): diffusion forcing with a shortcut model that predicts clean latents.

The model predicts clean latents directly (x-prediction) rather than velocities (v-prediction).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from dreamer.ops import flow
from dreamer.ops.shares import holds_any, num_own, own_rows, total, whole_size
from dreamer.types import Config

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noisy, signal_idx, step_idx) of the bootstrap rows -> clean prediction


class ShortcutForcingConfig(Config):
    bootstrap_fraction: float = Field(default=0.25, ge=0, le=1)  # rows that learn large steps from two half steps; the others learn d_min
    independent_fraction: float = Field(default=0.3, ge=0, le=1)  # rows whose steps are separate images, so that a video can start
    # Steps shown as the sampler shows its past, at context_signal with d_min. "random": this share of the steps, each drawn alone.
    # "alternating": every other step, in this share of the rows, so that most noisy steps follow a clear one.
    context_fraction: float = Field(default=0.0, ge=0, le=1)
    context_pattern: Literal["random", "alternating"] = "random"
    # The same share for rows that teach only the heads (phase 2's relevant rows): 1 shows them as acting will. null: as all others.
    heads_context_fraction: float | None = Field(default=None, ge=0, le=1)
    ramp_floor: float = Field(default=0.1, gt=0, le=1)  # weight at tau = 0; small deterministic worlds learn their actions faster with more
    context_signal: float = Field(
        default=0.9, gt=0, lt=1
    )  # signal (not noise) of past steps at inference; the paper's tau_ctx = 0.1 is noise


@dataclass(frozen=True)
class Corrupted:
    """Latents with noise, and what made them. The first ``num_flow`` rows are flow rows, the rest bootstrap rows. Where a batch is spread
    over processes: those of this one; ``has_bootstrap`` is the same in all of them."""

    clean: Float[Tensor, "B T N Z"]
    noisy: Float[Tensor, "B T N Z"]
    signal_idx: Int[Tensor, "B T"]
    step_idx: Int[Tensor, "B T"]
    num_flow: int
    has_bootstrap: bool


def bootstrap_target(
    denoise: Denoise,
    noisy: Float[Tensor, "B T N Z"],
    signal_idx: Int[Tensor, "B T"],
    step_idx: Int[Tensor, "B T"],
    max_steps: int,
) -> Float[Tensor, "B T N Z"]:
    """The clean prediction that the mean velocity of two half steps implies: z~ + (1 - tau) (b' + b'') / 2.

    ``(1 - tau)^2 ||(z1^ - z~) / (1 - tau) - (b' + b'') / 2||^2`` of Eq. 7 equals the squared distance of z1^ to this target.
    No gradient flows through either half step. Steps that already have d_min stay as they are in both; their target is not used.
    """
    with torch.no_grad():
        can_halve = step_idx < flow.num_step_sizes(max_steps) - 1
        tau = signal_idx / max_steps
        half = flow.step_size(step_idx) / 2 * can_halve
        half_idx = step_idx + can_halve.long()
        first_prediction = denoise(noisy, signal_idx, half_idx)
        first = flow.velocity(first_prediction, noisy, tau)
        halfway = flow.euler_step(first_prediction, noisy, tau, half)
        halfway_idx = signal_idx + (half * max_steps).long()
        second = flow.velocity(denoise(halfway, halfway_idx, half_idx), halfway, tau + half)
        return noisy + (1 - tau)[..., None, None] * (first + second) / 2


class ShortcutForcingLoss:
    """Corrupts a batch and scores the prediction of its clean latents."""

    def __init__(self, config: ShortcutForcingConfig, max_steps: int) -> None:
        self.config, self.max_steps = config, max_steps
        self.finest_idx = flow.num_step_sizes(max_steps) - 1

    def corrupt(
        self, latents: Float[Tensor, "B T N Z"], generator: torch.Generator | None = None, num_scored: int | None = None
    ) -> Corrupted:
        """Draw tau and d per step and add noise. Flow rows have d = d_min, bootstrap rows a uniform larger d.

        Bootstrap rows are the last ``bootstrap_fraction`` of the batch; of its last ``num_scored`` rows, where only these will count.

        In both, ``context_fraction`` of the steps stand as the sampler's past does: without it, bootstrap rows would never see the
        mixture of d_min and larger steps that sampling shows them.
        """
        batch, time = whole_size(len(latents)), latents.shape[1]
        device = latents.device
        num_flow = batch - self._num_bootstrap(batch if num_scored is None else num_scored, generator, device)
        step_idx = torch.full((batch, time), self.finest_idx, device=device)
        step_idx[num_flow:] = torch.randint(0, self.finest_idx, (batch - num_flow, time), generator=generator, device=device)
        signal_idx = flow.sample_signal_idx(step_idx, self.max_steps, generator)
        is_context = self._context_steps(batch, time, generator, device)
        if self.config.heads_context_fraction is not None and num_scored is not None:
            first = batch - num_scored
            draw = torch.rand((first, time), generator=generator, device=device)
            is_context[:first] = draw < self.config.heads_context_fraction
        step_idx[is_context] = self.finest_idx
        signal_idx[is_context] = flow.signal_index(self.config.context_signal, self.max_steps)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator, device=device, dtype=latents.dtype)
        noise, signal_idx, step_idx = map(own_rows, (noise, signal_idx, step_idx))
        noisy = flow.add_noise(latents, noise, signal_idx / self.max_steps)
        return Corrupted(latents, noisy, signal_idx, step_idx, num_own(num_flow), has_bootstrap=num_flow < batch)

    def _context_steps(self, batch: int, time: int, generator: torch.Generator | None, device: torch.device) -> Bool[Tensor, "B T"]:
        """Which steps stand as the sampler's past does."""
        if self.config.context_fraction == 0:
            return torch.zeros((batch, time), dtype=torch.bool, device=device)
        if self.config.context_pattern == "random":
            return torch.rand((batch, time), generator=generator, device=device) < self.config.context_fraction
        first = torch.randint(0, 2, (batch, 1), generator=generator, device=device)
        chosen = torch.rand((batch, 1), generator=generator, device=device) < self.config.context_fraction
        return ((torch.arange(time, device=device) + first) % 2 == 0) & chosen

    def _num_bootstrap(self, batch: int, generator: torch.Generator | None, device: torch.device) -> int:
        """``bootstrap_fraction`` of the rows; what is left of a row is drawn, or else small batches would never bootstrap."""
        share = self.config.bootstrap_fraction * batch
        left = share - int(share)
        return int(share) + (int(torch.rand((), generator=generator, device=device).item() < left) if left else 0)

    def __call__(
        self,
        prediction: Float[Tensor, "B T N Z"],
        corrupted: Corrupted,
        denoise: Denoise,
        rows: Bool[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Mean over all steps of w(tau) ||z1^ - target||^2 (mean over N and Z), or over those of the ``rows`` that are True.

        The target is the clean latents where d = d_min and ``bootstrap_target`` elsewhere; ``denoise`` is called on the bootstrap
        rows only, without gradient; on the last row where another process has some and this one none: sharded weights need every
        process in every pass.
        """
        c = corrupted
        target = c.clean
        if c.has_bootstrap:
            cut = min(c.num_flow, len(target) - 1)
            bootstrap = bootstrap_target(denoise, c.noisy[cut:], c.signal_idx[cut:], c.step_idx[cut:], self.max_steps)
            is_flow = (c.step_idx[cut:] == self.finest_idx)[..., None, None]
            target = torch.cat([target[:cut], torch.where(is_flow, c.clean[cut:], bootstrap.to(target.dtype))])
        squared = (prediction.float() - target.float()).square().mean(dim=(-2, -1))
        weighted = flow.ramp_weight(c.signal_idx / self.max_steps, self.config.ramp_floor) * squared
        counts = torch.ones_like(weighted) if rows is None else rows[:, None].to(weighted.dtype).expand_as(weighted)

        def mean_over(part: slice) -> Tensor:
            return total((weighted[part] * counts[part]).sum()) / total(counts[part].sum()).clamp(min=1)

        parts = {"flow_loss": slice(c.num_flow), "bootstrap_loss": slice(c.num_flow, None)}
        is_there = {name: holds_any(counts[part].bool()) for name, part in parts.items()}
        metrics = {name: mean_over(part).detach() for name, part in parts.items() if is_there[name]}  # a mean of nothing is left out
        return mean_over(slice(None)), metrics
