"""Phase 0: the tokenizer learns to rebuild frames of which patches are missing (Dreamer 4, Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from dreamer.losses.tokenizer_loss import Perceptual, tokenizer_loss
from dreamer.models.causal_tokenizer import CausalTokenizer, to_signed
from dreamer.training.loop import Phase, TrainConfig
from dreamer.types import Config, FrameBatch

Frames = UInt8[Tensor, "B F C H W"]


class Phase0Config(Config):
    train: TrainConfig = TrainConfig()
    num_frames: int = Field(default=1, ge=1)  # frames a row; more than 1 only helps a tokenizer with time layers
    masking_ramp: float = Field(default=0.3, ge=0, le=1)  # first share of the steps, over which masking grows to its full strength
    perceptual: Literal["none", "lpips"] = "none"  # lpips: needs the package's extra "metrics" and downloads weights once
    perceptual_weight: float = Field(default=0.2, ge=0)
    normalization_frames: int = Field(default=1024, ge=2)  # training frames that the latents' mean and deviation are taken from


class Phase0(Phase):
    """``forward(batch, step, generator) -> (loss, metrics)``. Every export has latents normalised on ``normalization``'s frames."""

    model: CausalTokenizer

    def __init__(
        self,
        tokenizer: CausalTokenizer,
        config: Phase0Config,
        normalization: Callable[[], Iterable[Frames]],
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config = tokenizer, config
        self.normalization, self.perceptual = normalization, perceptual

    def masking(self, step: int) -> float:
        """The largest share of patches dropped at this step: at full strength from the start, training stalls at the mean image."""
        ramp = self.config.masking_ramp * self.config.train.steps
        return self.model.config.max_masking * min(1.0, step / ramp if ramp else 1.0)

    def forward(self, batch: FrameBatch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        tokenizer = self.model
        bottleneck = tokenizer.bottleneck(tokenizer.patches(batch.frames), self.masking(step), generator)
        pixels = tokenizer.unpatch(tokenizer.reconstruct(bottleneck))
        return tokenizer_loss(pixels, to_signed(batch.frames), self.perceptual, self.config.perceptual_weight)

    def before_export(self) -> None:
        self.model.fit_normalization(self.normalization())


def make_perceptual(config: Phase0Config, device: torch.device) -> Perceptual | None:
    """The perceptual distance that ``config`` asks for. ``ValueError`` if it cannot be had: it is never left out in silence."""
    if config.perceptual == "none":
        return None
    remedy = "or set phase0.perceptual=none to train with the squared error alone"
    try:
        import lpips  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        missing = f"{error.name} is not installed; pip install 'dreamer4[metrics]'"
        raise ValueError(f"phase0.perceptual is 'lpips', but {missing}, {remedy}") from error
    try:
        network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        raise ValueError(
            f"phase0.perceptual is 'lpips', but the weights of its VGG network cannot be loaded ({error}); connect once, {remedy}"
        ) from error
    return lambda prediction, target: network(prediction, target).flatten()
