"""The frozen Cosmos tokenizer CV8x8x8 (NVIDIA, arXiv 2501.03575) behind the ``Tokenizer`` protocol.

Shape letters: B batch, F frames, T latent steps, C H W pixels of frames, h w pixels of the network, Y X latent positions (an eighth
of h w), N tokens, Z channels.

Frames are scaled up bicubically, encoded 8x smaller in space and, in time mode ``video``, in time (step 0 is frame 0, step t >= 1 frames
8t-7 .. 8t), normalised with the published statistics, and their positions are turned into tokens:

``mean``     each token is the mean over its block of positions; it cannot be decoded
``project``  each token holds the principal components of its block, fitted on data with ``fit_projection``; it can be decoded
``none``     each position is a token; nothing is lost

Long episodes go through in windows of ``reset_every`` frames, the length that the network was trained with: each window begins with the
last frame of the one before, whose latent step is not repeated. Pieces of a stream follow the same windows, so that a stream gives what
the whole episode gives. The decoder begins a window with the last decoded frame, encoded again as a first frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from dreamer.models.causal_tokenizer import to_signed, to_uint8
from dreamer.models.cosmos_spatial import BlockPCA, choose_token_grid, fold, mean_tokens, unfold
from dreamer.models.cosmos_stream import CosmosCache, stream_decode, stream_encode
from dreamer.models.cosmos_weights import Checksums, ScriptedCosmos, latent_statistics, load_network, load_scripted
from dreamer.types import Config

STRIDE = 8  # frames of a latent step, and pixels of a latent position
FRAMES_AT_ONCE = 64  # in time mode per_frame, so that long clips do not fill the memory


class CosmosTokenizerConfig(Config):
    enabled: bool = False  # false: the causal tokenizer is trained instead
    checkpoint_path: Path = Path("cosmos_tokenizer/CV8x8x8")  # folder with the weights: diffusers' layout, or NVIDIA's .jit files
    frame_size: tuple[int, int] = (64, 64)  # rows, columns of the frames
    upsampled_size: tuple[int, int] = (256, 256)  # what the network sees, multiples of 8; equal to frame_size: no scaling
    spatial_mode: Literal["mean", "project", "none"] = "mean"  # how latent positions become tokens
    time_mode: Literal["video", "per_frame"] = "video"  # 8 frames a latent step, or one
    num_latent_tokens: int = Field(default=16, ge=1)  # of a latent step, in the modes mean and project
    latent_dim: int = Field(default=16, ge=1)  # channels of a token, in the modes mean (always 16) and project
    reset_every: int = Field(default=121, ge=9)  # frames of a window: 8k + 1; what was before is forgotten
    trust_torchscript: bool = False  # run NVIDIA's TorchScript itself, which is code from elsewhere: to be typed, too; CUDA only
    checksums: Checksums = "report"  # require: refuse files whose MD5 is not known

    @model_validator(mode="after")
    def _check_sizes(self) -> CosmosTokenizerConfig:
        for side, frame, upsampled in zip(("height", "width"), self.frame_size, self.upsampled_size, strict=True):
            if upsampled % STRIDE or upsampled < 1:
                raise ValueError(f"upsampled_size has the {side} {upsampled}; expected a multiple of {STRIDE}")
            if not 1 <= frame <= upsampled:
                raise ValueError(f"frame_size has the {side} {frame}; expected 1 to that of upsampled_size, {upsampled}")
        if (self.reset_every - 1) % STRIDE:
            raise ValueError(f"reset_every is {self.reset_every}; expected {STRIDE}k + 1, such as 121")
        return self

    @property
    def temporal_stride(self) -> int:
        """P: frames of a latent step after the first."""
        return STRIDE if self.time_mode == "video" else 1

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of latent positions."""
        return self.upsampled_size[0] // STRIDE, self.upsampled_size[1] // STRIDE

    @property
    def num_tokens(self) -> int:
        """N: tokens of a latent step."""
        return self.position_grid[0] * self.position_grid[1] if self.spatial_mode == "none" else self.num_latent_tokens


class CosmosTokenizerWrapper(nn.Module):
    """Implements ``dreamer.types.Tokenizer``. Frozen: no gradients, always in eval mode; bf16 on CUDA, fp32 elsewhere."""

    can_decode_windows = True  # decode takes is_start
    latent_mean: Tensor  # (2, channels): a video's first latent step, the rest
    latent_std: Tensor

    def __init__(self, config: CosmosTokenizerConfig, network: nn.Module) -> None:
        """``network``: diffusers' ``AutoencoderKLCosmos``, or ``ScriptedCosmos``.

        Raises ``ValueError`` if the network does not compress by 8 in time and space, or if the tokens do not fit its positions.
        """
        super().__init__()
        settings: Any = network.config
        if (settings.temporal_compression_ratio, settings.spatial_compression_ratio) != (STRIDE, STRIDE):
            raise ValueError(
                f"{config.checkpoint_path}: this network compresses {settings.temporal_compression_ratio}x in time and "
                f"{settings.spatial_compression_ratio}x in space; expected CV8x8x8"
            )
        self.config, self.network = config, network
        self.frame_shape: tuple[int, int, int] = (3, *config.frame_size)
        self.position_grid, self.temporal_stride = config.position_grid, config.temporal_stride
        self.can_decode = config.spatial_mode != "mean"
        self.can_stream = config.time_mode == "per_frame" or not isinstance(network, ScriptedCosmos)
        self.num_network_channels: int = settings.latent_channels
        self.projection: BlockPCA | None = None
        if config.spatial_mode == "none":
            self.token_grid, self.latent_channels = self.position_grid, self.num_network_channels
        else:
            self.token_grid, self.latent_channels = choose_token_grid(self.position_grid, config.num_latent_tokens), config.latent_dim
        self.block = (self.position_grid[0] // self.token_grid[0], self.position_grid[1] // self.token_grid[1])
        if config.spatial_mode == "mean" and config.latent_dim != self.num_network_channels:
            raise ValueError(
                f"latent_dim is {config.latent_dim}; in spatial_mode mean tokens have the network's {self.num_network_channels} channels"
            )
        if config.spatial_mode == "project":
            self.projection = BlockPCA(self.num_network_channels * self.block[0] * self.block[1], config.latent_dim)
        mean, std = latent_statistics(network)
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_std", std)
        self.requires_grad_(False)
        self.train()

    @staticmethod
    def compute_temporal_latent_steps(num_frames: int) -> int:
        """T = 1 + ceil((F - 1) / 8), in time mode ``video``. Raises ``ValueError`` for less than one frame."""
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; expected at least 1")
        return 1 + -(-(num_frames - 1) // STRIDE)

    @property
    def device(self) -> torch.device:
        return self.latent_mean.device

    @property
    def architecture(self) -> dict[str, Any]:
        """What ``cosmos_weights.build_network`` needs to make this network again, as JSON values. The weights are in ``state_dict``."""
        settings: Any = self.network.config
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dict(settings).items() if not key.startswith("_")}

    def train(self, mode: bool = True) -> CosmosTokenizerWrapper:
        """Stays in eval mode, whatever the model around it does."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> CosmosTokenizerWrapper:
        """Every move to a device ends here: the network computes in bf16 on CUDA and in fp32 elsewhere."""
        super()._apply(fn, recurse)
        if not isinstance(self.network, ScriptedCosmos) and self._compute_dtype != self._device_dtype:
            nn.Module.to(self.network, self._device_dtype)  # diffusers' own warns of parts to keep in fp32, of which there are none
        return self

    @property
    def _device_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def _compute_dtype(self) -> torch.dtype:
        """That of the weights: while phase 0 adapts them they are fp32 everywhere."""
        return self._device_dtype if isinstance(self.network, ScriptedCosmos) else next(self.network.parameters()).dtype

    # ---- encoding -------------------------------------------------------------------------------------------------------------------

    def encode(self, frames: UInt8[Tensor, "B F C H W"], cache: CosmosCache | None = None) -> Float[Tensor, "B T N Z"]:
        """Normalised latents; unbounded. F frames give 1 + ceil((F - 1) / 8) steps (``per_frame``: F), the last frame repeated as needed.

        With ``cache``: the frames after those already encoded with it, a multiple of 8 (the first piece: 8k + 1); a piece of another length
        is filled up, and ends the stream. Raises ``ValueError`` for frames of another shape or type, and for a cache that does not fit.
        """
        return self._to_tokens(self.encode_positions(frames, cache))

    @torch.no_grad()
    def encode_positions(self, frames: UInt8[Tensor, "B F C H W"], cache: CosmosCache | None = None) -> Float[Tensor, "B Z T Y X"]:
        """As ``encode``, before positions become tokens: what ``fit_projection`` learns from."""
        self._check_frames(frames)
        cache = self._stream(cache, len(frames), "encoder")
        if self.temporal_stride == 1:
            singles = frames.flatten(0, 1).unsqueeze(1).split(FRAMES_AT_ONCE)
            latents = torch.cat([self._encode_piece(self._preprocess(part), cache) for part in singles])
            latents = rearrange(latents, "(b f) c 1 y x -> b c f y x", b=len(frames))
            return self._normalize(latents, is_start=True)
        is_start = cache.num_steps == 0
        return self._normalize(torch.cat(list(self._encoded(frames, cache)), dim=2), is_start)

    def _check_frames(self, frames: UInt8[Tensor, "B F C H W"]) -> None:
        if tuple(frames.shape[2:]) != self.frame_shape or frames.dtype != torch.uint8 or not frames.shape[1]:
            raise ValueError(
                f"frames are {tuple(frames.shape[1:])} (F, C, H, W) of {frames.dtype}; this tokenizer takes at least one frame of "
                f"{self.frame_shape} of torch.uint8 in [0, 255]"
            )

    def _encoded(self, frames: UInt8[Tensor, "B F C H W"], cache: CosmosCache) -> Iterator[Float[Tensor, "B Z t Y X"]]:
        """Latents as the network gives them, window by window."""
        if num_missing := -(frames.shape[1] - (cache.num_steps == 0)) % STRIDE:
            frames = torch.cat([frames, frames[:, -1:].expand(-1, num_missing, -1, -1, -1)], dim=1)
            cache.is_closed = True
        window_steps = self.compute_temporal_latent_steps(self.config.reset_every)
        while frames.shape[1]:
            repeated = int(cache.window_steps == window_steps)  # full: the last frame begins the next window, as its first latent step
            if repeated:
                cache.restart()
            num_frames = STRIDE * (window_steps - max(cache.window_steps, 1)) + (cache.num_steps == 0)
            pixels, frames = self._preprocess(frames[:, :num_frames]), frames[:, num_frames:]
            if repeated and cache.last_frame is not None:
                pixels = torch.cat([cache.last_frame, pixels], dim=2)
            latents = self._encode_piece(pixels, cache)
            cache.last_frame = pixels[:, :, -1:].clone()
            cache.window_steps += latents.shape[2]
            cache.num_steps += latents.shape[2] - repeated
            yield latents[:, :, repeated:]

    def _preprocess(self, frames: UInt8[Tensor, "B F C H W"]) -> Float[Tensor, "B C F h w"]:
        """To [-1, 1] at the network's size. Bicubic interpolation overshoots at edges, so it is clamped."""
        pixels = to_signed(frames.to(self.device))
        if self.config.upsampled_size != self.config.frame_size:
            flat = F.interpolate(pixels.flatten(0, 1), size=self.config.upsampled_size, mode="bicubic", align_corners=False)
            pixels = flat.unflatten(0, frames.shape[:2]).clamp(-1, 1)
        return pixels.transpose(1, 2)

    def _encode_piece(self, pixels: Float[Tensor, "B C F h w"], cache: CosmosCache | None) -> Float[Tensor, "B Z T Y X"]:
        network: Any = self.network
        if self.temporal_stride > 1 and cache is not None and cache.tails is not None:
            return stream_encode(network, pixels.to(self._compute_dtype), cache.tails).float()
        output = network.encode(pixels.to(self._compute_dtype))
        return (output if isinstance(output, Tensor) else output.latent_dist.mode()).float()

    # ---- decoding -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B T N Z"], cache: CosmosCache | None = None, *, is_start: bool = True
    ) -> UInt8[Tensor, "B F C H W"]:
        """Frames of the latents that ``encode`` gives: 1 + 8(T - 1) (``per_frame``: T), those that padding added included.

        With ``cache``: the steps after those already decoded with it, 8 frames each. ``is_start``: the (first) latents begin an episode, so
        that step 0 stands for one frame; False for a window from within one, where only that step's last frame is decoded.
        Raises ``ValueError`` in spatial mode ``mean``, for latents of another shape, and for a cache that does not fit.
        """
        if not self.can_decode:
            raise ValueError(
                "spatial_mode mean keeps only the mean of each block of positions, which cannot be decoded; use project or none"
            )
        num_tokens = self.token_grid[0] * self.token_grid[1]
        if tuple(latents.shape[2:]) != (num_tokens, self.latent_channels) or not latents.shape[1]:
            raise ValueError(
                f"latents are {tuple(latents.shape[1:])} (T, N, Z); this tokenizer has (any, {num_tokens}, {self.latent_channels})"
            )
        cache = self._stream(cache, len(latents), "decoder")
        positions = self._from_tokens(latents.to(self.device).float())
        raw = self._denormalize(positions, is_start=is_start and cache.num_steps == 0)
        if self.temporal_stride > 1:
            return torch.cat([self._postprocess(pixels) for pixels in self._decoded(raw, cache)], dim=1)
        singles = rearrange(raw, "b c t y x -> (b t) c 1 y x").split(FRAMES_AT_ONCE)
        frames = torch.cat([self._postprocess(self._decode_piece(part, cache)) for part in singles])
        return rearrange(frames, "(b t) 1 c h w -> b t c h w", b=len(latents))

    def _decoded(self, latents: Float[Tensor, "B Z T Y X"], cache: CosmosCache) -> Iterator[Float[Tensor, "B C f h w"]]:
        """Pixels as the network gives them, window by window."""
        window_steps = self.compute_temporal_latent_steps(self.config.reset_every)
        while latents.shape[2]:
            repeated = int(cache.window_steps == window_steps)
            if repeated and cache.last_frame is not None:
                # the encoder began this window with a first frame, whose latent was not kept: make it from the decoded frame
                latents = torch.cat([self._encode_piece(cache.last_frame, None), latents], dim=2)
                cache.restart()
            num_steps = window_steps - cache.window_steps
            piece, latents = latents[:, :, :num_steps], latents[:, :, num_steps:]
            pixels = self._decode_piece(piece, cache)
            cache.last_frame = pixels[:, :, -1:].clamp(-1, 1)
            cache.window_steps += piece.shape[2]
            cache.num_steps += piece.shape[2] - repeated
            yield pixels[:, :, repeated:]

    def _decode_piece(self, latents: Float[Tensor, "B Z T Y X"], cache: CosmosCache | None) -> Float[Tensor, "B C F h w"]:
        network: Any = self.network
        if self.temporal_stride > 1 and cache is not None and cache.tails is not None:
            return stream_decode(network, latents.to(self._compute_dtype), cache.tails).float()
        output = network.decode(latents.to(self._compute_dtype))
        return (output if isinstance(output, Tensor) else output.sample).float()

    def _postprocess(self, pixels: Float[Tensor, "B C F h w"]) -> UInt8[Tensor, "B F C H W"]:
        return to_uint8(self._scale_down(pixels))

    def _scale_down(self, pixels: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B F C H W"]:
        pixels = pixels.transpose(1, 2)
        if self.config.upsampled_size != self.config.frame_size:
            flat = F.interpolate(pixels.flatten(0, 1), size=self.config.frame_size, mode="bicubic", antialias=True, align_corners=False)
            pixels = flat.unflatten(0, pixels.shape[:2])
        return pixels

    def reconstruct(self, frames: UInt8[Tensor, "B F C H W"]) -> Float[Tensor, "B F C H W"]:
        """Pixels in about [-1, 1] of one window (8k + 1 frames, at most ``reset_every``) through encoder, tokens and decoder.

        As ``decode(encode(frames))``, but with gradient to the weights that require it: phase 0 adapts them through this.
        """
        self._check_frames(frames)
        pixels = self._preprocess(frames)
        if self.temporal_stride == 1:
            pixels = rearrange(pixels, "b c f h w -> (b f) c 1 h w")
        latents = self._normalize(self._encode_piece(pixels, None), is_start=True)
        positions = self._from_tokens(self._to_tokens(latents))
        decoded = self._scale_down(self._decode_piece(self._denormalize(positions, is_start=True), None))
        return rearrange(decoded, "(b f) 1 c h w -> b f c h w", b=len(frames)) if self.temporal_stride == 1 else decoded

    # ---- streams --------------------------------------------------------------------------------------------------------------------

    def new_cache(self, batch_size: int, part: Literal["encoder", "decoder"]) -> CosmosCache:
        """State for encoding or decoding a long episode piece by piece, equal to doing it at once.

        Raises ``ValueError`` where ``can_stream`` is false.
        """
        if not self.can_stream:
            raise ValueError("TorchScript encodes whole clips only; leave cosmos_tokenizer.trust_torchscript false to stream")
        return CosmosCache(batch_size, part)

    def _stream(self, cache: CosmosCache | None, batch_size: int, part: Literal["encoder", "decoder"]) -> CosmosCache:
        if cache is None:
            return CosmosCache(batch_size, part, tails=None)
        if (cache.part, cache.batch_size) != (part, batch_size):
            raise ValueError(
                f"the cache was made for the {cache.part} with batch size {cache.batch_size}; this is the {part} with {batch_size}"
            )
        if cache.is_closed:
            raise ValueError("the stream has ended: its last piece was no multiple of 8 frames (the first: 8k + 1) and was filled up")
        return cache

    # ---- normalisation and tokens -----------------------------------------------------------------------------------------------------

    def _statistics(self, num_steps: int, is_start: bool) -> tuple[Float[Tensor, "Z T 1 1"], Float[Tensor, "Z T 1 1"]]:
        """Mean and deviation of each step: the first set for a first frame (each is one in ``per_frame``), else the second."""
        rows = torch.zeros(num_steps, dtype=torch.long, device=self.device)
        if self.temporal_stride > 1:
            rows[int(is_start) :] = 1
        mean, std = (rearrange(table[rows], "t z -> z t 1 1") for table in (self.latent_mean, self.latent_std))
        return mean, std

    def _normalize(self, latents: Float[Tensor, "B Z T Y X"], is_start: bool) -> Float[Tensor, "B Z T Y X"]:
        mean, std = self._statistics(latents.shape[2], is_start)
        return (latents - mean) / std

    def _denormalize(self, latents: Float[Tensor, "B Z T Y X"], is_start: bool) -> Float[Tensor, "B Z T Y X"]:
        mean, std = self._statistics(latents.shape[2], is_start)
        return latents * std + mean

    def fit_projection(self, latents: Float[Tensor, "B Z T Y X"]) -> None:
        """Fit the map of spatial mode ``project`` on what ``encode_positions`` gives for frames of the data. It is saved in ``state_dict``.

        Raises ``ValueError`` in other modes, for latents of another shape, and for too few of them.
        """
        if self.projection is None:
            raise ValueError(f"spatial_mode is {self.config.spatial_mode}; only project has a projection to fit")
        if (latents.shape[1], *latents.shape[3:]) != (self.num_network_channels, *self.position_grid):
            raise ValueError(f"latents are {tuple(latents.shape)}; expected (B, {self.num_network_channels}, T, *{self.position_grid})")
        self.projection.fit(fold(latents, self.token_grid).flatten(0, 2))

    def _to_tokens(self, latents: Float[Tensor, "B C T Y X"]) -> Float[Tensor, "B T N Z"]:
        if self.config.spatial_mode == "mean":
            return mean_tokens(latents, self.token_grid)
        tokens = fold(latents, self.token_grid)
        return tokens if self.projection is None else self.projection(tokens)

    def _from_tokens(self, tokens: Float[Tensor, "B T N Z"]) -> Float[Tensor, "B C T Y X"]:
        values = tokens if self.projection is None else self.projection.inverse(tokens)
        return unfold(values, self.token_grid, self.block)

    def fingerprint(self) -> str:
        """SHA-256 of all that latents depend on: settings, encoder, projection and statistics. Not the decoder, which may be adapted while
        the latents stay as they are. The network's weights count as bf16, so that CPU and CUDA agree."""
        settings = self.config.model_dump_json(exclude={"enabled", "checkpoint_path", "trust_torchscript", "checksums"})
        digest = hashlib.sha256(f"{settings} {type(self.network).__name__}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(("network.decoder.", "network.post_quant_conv.")):
                continue
            value = tensor.to(torch.bfloat16) if name.startswith("network.") and tensor.is_floating_point() else tensor
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
        return digest.hexdigest()


def create_cosmos_tokenizer(checkpoint_path: Path | str, device: torch.device | str = "cpu", **settings: Any) -> CosmosTokenizerWrapper:
    """The frozen tokenizer with the weights in ``checkpoint_path``; ``settings`` are fields of ``CosmosTokenizerConfig``.

    Raises ``ValueError`` that says what to do: where to get missing weights, what to install, which file or setting is wrong.
    """
    config = CosmosTokenizerConfig(enabled=True, checkpoint_path=Path(checkpoint_path), **settings)
    return create_cosmos_tokenizer_from_config(config, device)


def create_cosmos_tokenizer_from_config(config: CosmosTokenizerConfig, device: torch.device | str = "cpu") -> CosmosTokenizerWrapper:
    """As ``create_cosmos_tokenizer``. Also raises ``ValueError`` if the config is not enabled."""
    if not config.enabled:
        raise ValueError("cosmos_tokenizer.enabled is false: this config uses the causal tokenizer")
    if config.trust_torchscript:
        network: nn.Module = load_scripted(config.checkpoint_path, device, config.checksums)
    else:
        network = load_network(config.checkpoint_path, config.checksums)
    return CosmosTokenizerWrapper(config, network).to(device)
