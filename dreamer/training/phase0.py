"""Phase 0: the tokenizer learns to rebuild frames of which patches are missing (Dreamer 4, Eq. 5), or Cosmos adapts to a domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor, nn

from dreamer.losses.tokenizer_loss import Perceptual, tokenizer_loss
from dreamer.models.causal_tokenizer import CausalTokenizer, to_signed
from dreamer.models.cosmos_tokenizer_wrapper import CosmosTokenizerWrapper
from dreamer.training.loop import Phase, TrainConfig
from dreamer.types import Config, FrameBatch

Frames = UInt8[Tensor, "B F C H W"]

ENCODER = ("encoder", "quant_conv")  # the parts of the Cosmos network
DECODER = ("post_quant_conv", "decoder")


class CosmosAdaptationConfig(Config):
    adapt: Literal["none", "decoder", "all"] = "none"  # what of a Cosmos tokenizer learns the domain; none: it is taken as it is
    encoder_rate_factor: float = Field(default=0.1, gt=0, le=1)  # of the learning rate, for the encoder with adapt: all


class Phase0Config(Config):
    train: TrainConfig = TrainConfig()
    num_frames: int = Field(default=1, ge=1)  # frames a row; more than 1 only helps a tokenizer with time layers; Cosmos: 8k + 1
    masking_ramp: float = Field(default=0.3, ge=0, le=1)  # first share of the steps, over which masking grows to its full strength
    perceptual: Literal["none", "lpips"] = "none"  # lpips: needs the package's extra "metrics" and downloads weights once
    perceptual_weight: float = Field(default=0.2, ge=0)
    normalization_frames: int = Field(default=1024, ge=2)  # training frames that latents are normalised with, or projected
    cosmos: CosmosAdaptationConfig = CosmosAdaptationConfig()


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


class Phase0Cosmos(Phase):
    """``forward(batch, step, generator) -> (loss, metrics)``: the decoder of a Cosmos tokenizer, or all of it, learns to rebuild frames.

    Here alone its weights are not frozen, and those of the chosen parts only; a checkpoint of it loads frozen, as any. The latents keep
    their normalisation and projection: with them inside, encoder and decoder learn to fit each other, and another one at the end would
    undo that. With ``adapt: decoder`` latents stay as they were, bit for bit.
    """

    model: CosmosTokenizerWrapper

    def __init__(self, tokenizer: CosmosTokenizerWrapper, config: Phase0Config, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        if not tokenizer.can_decode:
            raise ValueError("phase0.cosmos.adapt needs latents that can be decoded; cosmos_tokenizer.spatial_mode mean keeps too little")
        self.model, self.config, self.perceptual = tokenizer, config, perceptual
        network: Any = nn.Module.float(tokenizer.network)  # small steps would be lost in bf16
        for part in DECODER if config.cosmos.adapt == "decoder" else ENCODER + DECODER:
            getattr(network, part).requires_grad_(True)

    def rate_factor(self, name: str) -> float:
        is_encoder = name.startswith(tuple(f"network.{part}." for part in ENCODER))
        return self.config.cosmos.encoder_rate_factor if is_encoder else 1.0

    def forward(self, batch: FrameBatch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rebuilt = self.model.reconstruct(batch.frames)
        return tokenizer_loss(rebuilt, to_signed(batch.frames), self.perceptual, self.config.perceptual_weight)


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
