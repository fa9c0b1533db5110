"""Does a dynamics model predict clean latents (x-prediction), or velocities, or the noise? Told from what it puts out, and from its loss.

``dreamer check`` prints the figures for a run.

With z0 the noise, z1 the clean latents and z~ = (1 - tau) z0 + tau z1, a network f(z~, tau) that has learned shows at its two ends what it
was taught. At tau = 0 its input is noise alone: an x-predictor cannot but answer with a mean of the data, in which no z0 stands, while
a velocity z1 - z0 holds the noise with the factor -1. At the highest tau its input is nearly clean: an x-predictor hands it on.

Shape letters: B batch, T latent steps, N tokens, Z channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamer.losses.shortcut_loss import Corrupted, ShortcutForcingConfig, ShortcutForcingLoss, bootstrap_target
from dreamer.models import Agent
from dreamer.models.dynamics import Dynamics
from dreamer.ops import flow
from dreamer.types import Batch

SIGNAL_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # the last stands for the highest on the model's grid, 1 - d_min
TOLERANCE = 1e-3  # of a target, in standard deviations of the latents: rounding


@dataclass(frozen=True)
class LevelFigures:
    """What the output is at one signal level. Errors are mean squares, as shares of the variance: 1 is no better than a constant."""

    signal_level: float
    clean_error: float  # of the output as z1
    velocity_error: float  # of the output as z1 - z0
    noise_error: float  # of the output as z0
    implied_velocity_error: float  # of (output - z~) / (1 - tau) as z1 - z0: what the sampler steps along
    noise_share: float  # how much of a change of z0, at the same z1, the output shows: velocities -1 at tau = 0, clean latents 0, noise 1


@dataclass(frozen=True)
class XPredictionReport:
    levels: tuple[LevelFigures, ...]  # from noise to nearly clean
    # largest distance of z1 from where the loss pulls this model's output, over two draws of noise; in deviations of z1
    target_error: float
    bootstrap_error: float  # the same of the target of larger steps, if both of their half steps were perfect

    @property
    def trains_x_prediction(self) -> bool:
        """Whether the loss asks for clean latents, whatever the noise. Holds for a fresh model, too."""
        return max(self.target_error, self.bootstrap_error) < TOLERANCE

    @property
    def reads_as(self) -> Literal["clean latents", "velocities", "noise", "nothing clear"]:
        """What the model has learned to put out; ``nothing clear`` where it has not learned enough to tell."""
        share = self.levels[0].noise_share
        if abs(share) > 0.5:
            return "velocities" if share < 0 else "noise"
        return "clean latents" if abs(share) < 0.25 and self.levels[-1].clean_error < 0.5 else "nothing clear"

    @property
    def is_x_prediction(self) -> bool:
        """Whether the model puts out clean latents, and is trained to."""
        return self.reads_as == "clean latents" and self.trains_x_prediction

    def text(self) -> str:
        lines = ["signal  error as: clean  velocity     noise   implied velocity   noise in it"]
        for level in self.levels:
            lines.append(
                f"{level.signal_level:6.3f}  {level.clean_error:15.4f}  {level.velocity_error:8.4f}  {level.noise_error:8.4f}"
                f"  {level.implied_velocity_error:17.4f}  {level.noise_share:12.4f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def verify_x_prediction(model: Dynamics | Agent, batch: Batch, *, seed: int = 0) -> XPredictionReport:
    """Measure what ``model`` puts out for ``batch``, which should be like what it was trained on, and what its loss would have it put out.

    Raises ``ValueError`` if the latents of the batch are all the same.
    """
    dynamics = model.dynamics if isinstance(model, Agent) else model
    batch = batch.to(dynamics.device)
    max_steps, clean = dynamics.config.max_steps, batch.latents
    if float(clean.std()) == 0:
        raise ValueError("the batch's latents are all the same: nothing can be predicted better or worse; give a batch of recorded windows")

    def denoise(noisy: Float[Tensor, "B T N Z"], signal_idx: Int[Tensor, "B T"], step_idx: Int[Tensor, "B T"]) -> Tensor:
        return dynamics(noisy, signal_idx, step_idx, batch.prev_actions, batch.prev_action_mask).latents

    generator = torch.Generator(dynamics.device).manual_seed(seed)
    finest = torch.full(clean.shape[:2], flow.num_step_sizes(max_steps) - 1, device=clean.device)
    levels = []
    for level in SIGNAL_LEVELS:
        signal_idx = torch.full_like(finest, flow.signal_index(level, max_steps))
        tau = signal_idx / max_steps
        noises = [torch.randn(clean.shape, generator=generator, device=clean.device) for _ in range(2)]
        outputs = [denoise(flow.add_noise(clean, noise, tau), signal_idx, finest) for noise in noises]
        levels.append(_figures(clean, noises, outputs, tau))

    loss = ShortcutForcingLoss(ShortcutForcingConfig(bootstrap_fraction=0.0), max_steps)
    errors = []
    for _ in range(2):
        corrupted = loss.corrupt(clean, generator)
        prediction = denoise(corrupted.noisy, corrupted.signal_idx, corrupted.step_idx)
        errors.append((_target_of(loss, prediction, corrupted) - clean).abs().max())
    large = ShortcutForcingLoss(ShortcutForcingConfig(bootstrap_fraction=1.0), max_steps).corrupt(clean, generator)
    bootstrap = bootstrap_target(lambda *_: clean, large.noisy, large.signal_idx, large.step_idx, max_steps)
    return XPredictionReport(
        tuple(levels), float(torch.stack(errors).max() / clean.std()), float((bootstrap - clean).abs().max() / clean.std())
    )


def _figures(clean: Tensor, noises: list[Tensor], outputs: list[Tensor], tau: Float[Tensor, "B T"]) -> LevelFigures:
    """The mean of both draws of noise; their difference tells how much noise stands in the output."""

    def error(predictions: list[Tensor], targets: list[Tensor]) -> float:
        predicted, target = torch.stack(predictions), torch.stack(targets)
        return float((predicted - target).square().mean() / target.var())

    velocities = [clean - noise for noise in noises]
    noisy = [flow.add_noise(clean, noise, tau) for noise in noises]
    changed = noises[1] - noises[0]
    return LevelFigures(
        signal_level=float(tau[0, 0]),
        clean_error=error(outputs, [clean, clean]),
        velocity_error=error(outputs, velocities),
        noise_error=error(outputs, noises),
        implied_velocity_error=error([flow.velocity(o, z, tau) for o, z in zip(outputs, noisy, strict=True)], velocities),
        noise_share=float(((outputs[1] - outputs[0]) * changed).sum() / changed.square().sum()),
    )


def _target_of(loss: ShortcutForcingLoss, prediction: Float[Tensor, "B T N Z"], corrupted: Corrupted) -> Float[Tensor, "B T N Z"]:
    """Where the loss pulls a prediction p: of the mean of w (p - y)^2 the gradient is 2 w (p - y) / n, which gives y."""
    with torch.enable_grad():
        free = prediction.detach().requires_grad_()
        value, _ = loss(free, corrupted, lambda *_: corrupted.clean)
        (gradient,) = torch.autograd.grad(value, free)
    weight = flow.ramp_weight(corrupted.signal_idx / loss.max_steps, loss.config.ramp_floor)[..., None, None]
    return prediction - gradient * gradient.numel() / (2 * weight)
