"""The Cosmos network piece by piece: each piece of a clip, given what is remembered of the pieces before, as in the whole clip.

Shape letters: B batch, F frames, T latent steps (inside the network: time steps at its current rate), Y X positions, Z and C channels.

Three kinds of layers look back in time: convolutions of three steps, halving and doubling of the frame rate, and temporal attention.
Their modules are the keys of ``Tails``; the values are the last steps of a convolution's input, or all keys and values of an attention.
All other layers treat each step alone and are called as they are. A clip begins with one frame more than whole latent steps (1 + 8k
frames), a later piece has 8k. The structure is that of diffusers' ``AutoencoderKLCosmos``, whose weights and submodules are used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Tails = dict[nn.Module, tuple[Tensor, ...]]


@dataclass
class CosmosCache:
    """State of one stream, for encoding or for decoding. Memory grows until the window is full, then begins anew."""

    batch_size: int
    part: Literal["encoder", "decoder"]
    tails: Tails | None = field(default_factory=dict)  # None: nothing is kept, as each piece ends its window
    num_steps: int = 0  # latent steps since the stream began
    window_steps: int = 0  # latent steps since the window began, its first frame's included
    last_frame: Tensor | None = None  # (B, 3, 1, H, W) in [-1, 1], at the network's size: with it the next window begins
    is_closed: bool = False  # the last piece was padded: nothing can follow

    def restart(self) -> None:
        """Begin a new window: forget all but the last frame."""
        self.tails = None if self.tails is None else {}
        self.window_steps = 0

    def rows(self, rows: Tensor) -> CosmosCache:
        """The streams of some rows of the batch."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[rows.to(tensor.device)]

        return CosmosCache(
            len(rows),
            self.part,
            None if self.tails is None else {module: tuple(map(pick, kept)) for module, kept in self.tails.items()},
            self.num_steps,
            self.window_steps,
            None if self.last_frame is None else pick(self.last_frame),
            self.is_closed,
        )


def stream_encode(network: Any, pixels: Float[Tensor, "B 3 F H W"], tails: Tails) -> Float[Tensor, "B Z T Y X"]:
    """Latents of the next frames. ``tails`` is empty for the first piece (1 + 8k frames, later 8k) and is brought up to date."""
    piece, encoder = _Piece(tails), network.encoder
    x = piece.haar(encoder.patch_embed, pixels)
    x = piece.pair(encoder.conv_in, x)
    for block in encoder.down_blocks:
        x = piece.block(block, x)
        for downsampler in block.downsamplers or ():
            x = piece.downsample(downsampler, x)
    x = piece.middle(encoder.mid_block, x)
    return network.quant_conv(piece.pair(encoder.conv_out, F.silu(encoder.norm_out(x))))


def stream_decode(network: Any, latents: Float[Tensor, "B Z T Y X"], tails: Tails) -> Float[Tensor, "B 3 F H W"]:
    """Frames of the next latent steps: 1 + 8(T - 1) of the first piece, for which ``tails`` is empty, and 8T of later ones."""
    piece, decoder = _Piece(tails), network.decoder
    x = piece.pair(decoder.conv_in, network.post_quant_conv(latents))
    x = piece.middle(decoder.mid_block, x)
    for block in decoder.up_blocks:
        x = piece.block(block, x)
        for upsampler in block.upsamplers or ():
            x = piece.upsample(upsampler, x)
    x = piece.pair(decoder.conv_out, F.silu(decoder.norm_out(x)))
    return piece.haar(decoder.unpatch_embed, x)


class _Piece:
    """The layers that look back, for one piece of a clip."""

    def __init__(self, tails: Tails) -> None:
        self.tails, self.is_first = tails, not tails

    def convolve(self, conv: Any, x: Tensor) -> Tensor:
        """A causal convolution over time; before a clip's first step stand copies of it."""
        if conv.kernel_size[0] == 1:
            return conv(x)
        history = x[:, :, :1].expand(-1, -1, conv.kernel_size[0] - 1, -1, -1) if self.is_first else self.tails[conv][0]
        extended = torch.cat([history, x], dim=2)
        self.tails[conv] = (extended[:, :, -history.shape[2] :].clone(),)  # a slice would keep all of it alive
        return nn.Conv3d.forward(conv, extended)  # without the padding that the class itself adds

    def haar(self, layer: Any, x: Tensor) -> Tensor:
        """The Haar transform or its inverse. It treats each step alone but takes the first for a clip's first: give one to drop."""
        return layer(x) if self.is_first else layer(torch.cat([x[:, :, :1], x], dim=2))[:, :, 1:]

    def pair(self, projection: Any, x: Tensor) -> Tensor:
        """A convolution over space, then one over time."""
        return self.convolve(projection.conv_t, projection.conv_s(x))

    def residual(self, resnet: Any, x: Tensor) -> Tensor:
        hidden = self.pair(resnet.conv1, F.silu(resnet.norm1(x)))
        hidden = self.pair(resnet.conv2, F.silu(resnet.norm2(hidden)))
        return resnet.conv_shortcut(x) + hidden

    def attend(self, attention: Any, x: Tensor) -> Tensor:
        """Each position attends to its own past and present."""
        normed = attention.norm(x)
        query, key, value = attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)
        if not self.is_first:
            past_key, past_value = self.tails[attention]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.tails[attention] = (key, value)
        heads, past = attention.num_attention_heads, key.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=x.device).tril(past)
        q, k, v = (rearrange(t, "b (g e) t y x -> (b y x) g t e", g=heads) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = rearrange(out, "(b y x) g t e -> b (g e) t y x", y=x.shape[3], x=x.shape[4])
        return attention.to_out[0](out) + x

    def block(self, block: Any, x: Tensor) -> Tensor:
        for resnet, attention, temporal in zip(block.resnets, block.attentions, block.temp_attentions, strict=True):
            x = self.residual(resnet, x)
            x = x if attention is None else attention(x)
            x = x if temporal is None else self.attend(temporal, x)
        return x

    def middle(self, block: Any, x: Tensor) -> Tensor:
        x = self.residual(block.resnets[0], x)
        for attention, temporal, resnet in zip(block.attentions, block.temp_attentions, block.resnets[1:], strict=True):
            x = self.residual(resnet, self.attend(temporal, attention(x)))
        return x

    def downsample(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.spatial_downsample and not layer.temporal_downsample:
            return x
        if layer.spatial_downsample:
            x = F.pad(x, (0, 1, 0, 1, 0, 0))
            x = layer.conv1(x) + F.avg_pool3d(x, (1, 2, 2))
        if layer.temporal_downsample:
            if self.is_first:  # the first step becomes one of its own, averaged with its copy
                before, x = x[:, :, :1], torch.cat([x[:, :, :1], x], dim=2)
            else:
                (before,) = self.tails[layer]
            self.tails[layer] = (x[:, :, -1:].clone(),)
            x = nn.Conv3d.forward(layer.conv2, torch.cat([before, x], dim=2)) + F.avg_pool3d(x, (2, 1, 1))
        return layer.conv3(x)

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        if not layer.spatial_upsample and not layer.temporal_upsample:
            return x
        if layer.temporal_upsample:
            x = x.repeat_interleave(2, dim=2)
            x = x[:, :, 1:] if self.is_first else x  # a clip's first step stays one
            x = self.convolve(layer.conv1, x) + x
        if layer.spatial_upsample:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = layer.conv2(x) + x
        return layer.conv3(x)
