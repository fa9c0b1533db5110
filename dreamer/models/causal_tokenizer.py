"""The causal tokenizer: a masked autoencoder with a tanh bottleneck (Dreamer 4, Section 3.1), for users without Cosmos weights.

Shape letters: B batch, F frames (one latent step each), C H W pixels, L patches of a frame, N latent tokens, Z latent channels.

Two layouts of the latent tokens:

``free``     the paper's: learned latent tokens read the patches; patch queries of the decoder read the latents.
``aligned``  each latent token stands for its own block of patches, encoded and decoded without the rest of the image. What moves
             in one place then changes the latents of that place alone, which small dynamics learn much faster; a choice of this project.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from dreamer.models.transformer import TimeCache, Transformer, TransformerConfig, grid_angles
from dreamer.ops.shares import own_rows, whole_size
from dreamer.types import Config


class CausalTokenizerConfig(Config):
    patch_size: int = Field(default=8, ge=1)
    token_grid: tuple[int, int] = (4, 4)  # rows, columns of latent tokens
    latent_channels: int = Field(default=16, ge=1)
    layout: Literal["free", "aligned"] = "aligned"
    encoder: TransformerConfig = TransformerConfig(width=256, num_layers=4)
    decoder: TransformerConfig = TransformerConfig(width=256, num_layers=4)
    max_masking: float = Field(default=0.9, ge=0, lt=1)  # patch dropout p ~ U(0, max_masking) per image


def to_signed(frames: UInt8[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """uint8 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_uint8(pixels: Float[Tensor, "*S"]) -> UInt8[Tensor, "*S"]:
    """[-1, 1] to uint8, rounded and clamped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class CausalTokenizer(nn.Module):
    """Implements ``dreamer.types.Tokenizer``, one latent step per frame (temporal stride 1)."""

    temporal_stride = 1
    can_decode = True
    can_stream = True
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: CausalTokenizerConfig, frame_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = frame_shape
        patch, (rows, columns) = config.patch_size, config.token_grid
        if height % (patch * rows) or width % (patch * columns):
            raise ValueError(
                f"frames of {height}x{width} do not divide into {rows}x{columns} tokens of whole {patch}x{patch} patches; "
                "change tokenizer.token_grid or tokenizer.patch_size, or resize the frames"
            )
        self.config, self.frame_shape = config, frame_shape
        self.token_grid, self.latent_channels = config.token_grid, config.latent_channels
        self.patch_grid = (height // patch, width // patch)
        self.fold = (self.patch_grid[0] // rows, self.patch_grid[1] // columns)  # patches per token
        num_patches, num_latents = self.patch_grid[0] * self.patch_grid[1], rows * columns
        enc, dec = config.encoder.width, config.decoder.width
        attended = self.fold if config.layout == "aligned" else self.patch_grid  # the patches that see each other
        encoder_angles = grid_angles(attended, config.encoder.head_width)
        decoder_angles = grid_angles(attended, config.decoder.head_width)
        if config.layout == "aligned":
            num_patches = group = self.fold[0] * self.fold[1]
            self.to_latent = nn.Linear(enc * group, config.latent_channels)
            self.from_latent = nn.Linear(config.latent_channels, dec * group)
        else:
            self.latent_tokens = nn.Parameter(torch.randn(num_latents, enc) * 0.02)
            self.latent_position = nn.Parameter(torch.randn(num_latents, dec) * 0.02)
            self.to_latent = nn.Linear(enc, config.latent_channels)
            self.from_latent = nn.Linear(config.latent_channels, dec)
            encoder_angles = torch.cat([encoder_angles, torch.zeros(num_latents, encoder_angles.shape[1])])
            decoder_angles = torch.cat([torch.zeros(num_latents, decoder_angles.shape[1]), decoder_angles])
        self.patch_in = nn.Linear(channels * patch * patch, enc)
        self.patch_position = nn.Parameter(torch.randn(num_patches, enc) * 0.02)
        self.masked_patch = nn.Parameter(torch.randn(enc) * 0.02)
        self.query_position = nn.Parameter(torch.randn(num_patches, dec) * 0.02)
        self.patch_out = nn.Linear(dec, channels * patch * patch)
        self.encoder = Transformer(config.encoder, encoder_angles)
        self.decoder = Transformer(config.decoder, decoder_angles)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    def patches(self, frames: UInt8[Tensor, "B F C H W"]) -> Float[Tensor, "B F L K"]:
        """Frames in [-1, 1] as rows of K = C * patch * patch pixels."""
        if tuple(frames.shape[2:]) != self.frame_shape:
            raise ValueError(f"frames are {tuple(frames.shape[2:])} (C, H, W); this tokenizer was made for {self.frame_shape}")
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are {frames.dtype}; expected torch.uint8 in [0, 255]")
        size = self.config.patch_size
        return rearrange(to_signed(frames), "b f c (y p) (x q) -> b f (y x) (c p q)", p=size, q=size)

    def bottleneck(
        self,
        patches: Float[Tensor, "B F L K"],
        masking: float = 0.0,
        generator: torch.Generator | None = None,
        cache: TimeCache | None = None,
    ) -> Float[Tensor, "B F N Z"]:
        """Latents in (-1, 1), before normalisation; patches are dropped with p ~ U(0, masking) per image."""
        tokens = self.patch_in(patches)
        if masking > 0:
            shape = (whole_size(len(tokens)), *tokens.shape[1:3], 1)
            drop = torch.rand((*shape[:2], 1, 1), generator=generator, device=tokens.device) * masking
            dropped = own_rows(torch.rand(shape, generator=generator, device=tokens.device) < drop)
            tokens = torch.where(dropped, self.masked_patch.to(tokens.dtype), tokens)
        if self.config.layout == "aligned":
            (rows, columns), (down, across) = self.token_grid, self.fold
            blocks = rearrange(tokens, "b f (r i c j) d -> (b r c) f (i j) d", r=rows, c=columns, i=down, j=across)
            hidden = self.encoder(blocks + self.patch_position, cache=cache, write=cache is not None)
            hidden = rearrange(hidden, "(b n) f l d -> b f n (l d)", n=rows * columns)
        else:
            tokens = tokens + self.patch_position
            latents = repeat(self.latent_tokens.to(tokens.dtype), "n d -> b f n d", b=tokens.shape[0], f=tokens.shape[1])
            count = latents.shape[2]
            # latents read the patches, nothing reads the latents: the one-way attention of the agent token
            hidden = self.encoder(torch.cat([tokens, latents], dim=2), num_agent=count, cache=cache, write=cache is not None)
            hidden = hidden[:, :, -count:]
        return torch.tanh(self.to_latent(hidden).float())

    def reconstruct(self, bottleneck: Float[Tensor, "B F N Z"], cache: TimeCache | None = None) -> Float[Tensor, "B F L K"]:
        """Patches of pixels in about [-1, 1] from latents before normalisation."""
        tokens = self.from_latent(bottleneck)
        if self.config.layout == "aligned":
            (rows, columns), (down, across) = self.token_grid, self.fold
            blocks = rearrange(tokens, "b f n (l d) -> (b n) f l d", l=down * across)
            hidden = self.decoder(blocks + self.query_position, cache=cache, write=cache is not None)
            hidden = rearrange(hidden, "(b r c) f (i j) d -> b f (r i c j) d", r=rows, c=columns, i=down, j=across)
        else:
            queries = repeat(self.query_position.to(tokens.dtype), "l d -> b f l d", b=tokens.shape[0], f=tokens.shape[1])
            tokens = torch.cat([tokens + self.latent_position, queries], dim=2)
            hidden = self.decoder(tokens, num_agent=queries.shape[2], cache=cache, write=cache is not None)
            hidden = hidden[:, :, -queries.shape[2] :]
        return self.patch_out(hidden).float()

    def unpatch(self, patches: Float[Tensor, "B F L K"]) -> Float[Tensor, "B F C H W"]:
        size, (rows, columns) = self.config.patch_size, self.patch_grid
        return rearrange(patches, "b f (y x) (c p q) -> b f c (y p) (x q)", y=rows, x=columns, p=size, q=size)

    def encode(self, frames: UInt8[Tensor, "B F C H W"], cache: TimeCache | None = None) -> Float[Tensor, "B F N Z"]:
        """Latents with about zero mean and unit variance. With ``cache``: the frames after those already encoded with it."""
        latents = self.bottleneck(self.patches(frames.to(self.device)), cache=cache)
        return (latents - self.latent_mean) / self.latent_std

    def decode(self, latents: Float[Tensor, "B F N Z"], cache: TimeCache | None = None) -> UInt8[Tensor, "B F C H W"]:
        """Frames of the latents that ``encode`` gives; predictions beyond the tanh's range are clamped to it."""
        bottleneck = (latents * self.latent_std + self.latent_mean).clamp(-1, 1)
        return to_uint8(self.unpatch(self.reconstruct(bottleneck, cache)))

    def new_cache(self, batch_size: int, part: Literal["encoder", "decoder"]) -> TimeCache:
        """State for encoding or decoding a long episode piece by piece, equal to doing it at once."""
        transformer = self.encoder if part == "encoder" else self.decoder
        blocks = self.token_grid[0] * self.token_grid[1] if self.config.layout == "aligned" else 1
        cache = transformer.new_cache(batch_size * blocks, transformer.space_cos.shape[0])
        return dataclasses.replace(cache, num_blocks=blocks)

    @torch.no_grad()
    def fit_normalization(self, batches: Iterable[UInt8[Tensor, "_ _ C H W"]]) -> None:
        """Set the latents' mean and standard deviation per channel from uint8 frame batches (B, F, C, H, W)."""
        values = torch.cat([self.bottleneck(self.patches(f.to(self.device))).flatten(0, 2) for f in batches])
        self.latent_mean.copy_(values.mean(0))
        self.latent_std.copy_(values.std(0).clamp(min=1e-4))

    def fingerprint(self) -> str:
        """SHA-256 of the settings, the frames' shape and every weight."""
        digest = hashlib.sha256(f"{self.config.model_dump_json()} {list(self.frame_shape)}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
        return digest.hexdigest()
