"""What acting and dreaming ask of a tokenizer, beyond encoding and decoding whole clips: streams, and windows from within an episode."""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dreamer.models import Agent
from dreamer.types import Tokenizer


@runtime_checkable
class StreamCache(Protocol):
    """What a stream remembers of a batch of videos."""

    def rows(self, rows: Int[Tensor, " b"]) -> StreamCache:
        """The same for some videos of the batch."""
        ...


@runtime_checkable
class StreamingTokenizer(Tokenizer, Protocol):
    """A tokenizer that encodes and decodes long videos piece by piece; ``cache`` holds what came before. The first piece is one frame
    (of latents, one step); each later step is P frames."""

    def encode(self, frames: UInt8[Tensor, "B F C H W"], cache: Any = None) -> Float[Tensor, "B T N Z"]: ...

    def decode(self, latents: Float[Tensor, "B T N Z"], cache: Any = None) -> UInt8[Tensor, "B F C H W"]: ...

    def new_cache(self, batch_size: int, part: Literal["encoder", "decoder"]) -> StreamCache: ...


@runtime_checkable
class WindowTokenizer(Tokenizer, Protocol):
    """A tokenizer of temporal stride above 1 that also decodes windows from within an episode.

    With ``is_start=False`` the first latent step is one of P frames, of which the last is decoded: T steps from step t on give the frames
    Pt .. P(t+T-1), as many as at an episode's start.
    """

    can_decode_windows: bool

    def decode(self, latents: Float[Tensor, "B T N Z"], *, is_start: bool = True) -> UInt8[Tensor, "B F C H W"]: ...


def require_streaming(tokenizer: Tokenizer, agent: Agent) -> StreamingTokenizer:
    """The same tokenizer. Raises ``ValueError`` unless it streams, with P or one action of the agent for each P frames."""
    stride, num_actions = tokenizer.temporal_stride, agent.dynamics.actions_per_step
    if not tokenizer.can_stream:
        raise ValueError(
            "the tokenizer encodes whole clips only (can_stream is false); acting and dreaming step by step need one that streams"
        )
    if num_actions not in (1, stride):
        raise ValueError(f"the agent takes {num_actions} actions a latent step of {stride} frames; expected {stride}, or 1 that is held")
    return cast(StreamingTokenizer, tokenizer)


def decodes_windows(tokenizer: Tokenizer) -> bool:
    """Whether latent windows can be decoded wherever they begin, or at an episode's start only."""
    return tokenizer.temporal_stride == 1 or (isinstance(tokenizer, WindowTokenizer) and tokenizer.can_decode_windows)


def decode_windows(
    tokenizer: Tokenizer, latents: Float[Tensor, "B T N Z"], is_start: Bool[Tensor, " B"], **cache: Any
) -> UInt8[Tensor, "B F C H W"]:
    """1 + P(T - 1) frames of each window; ``is_start`` says which begin their episode. With ``cache=`` all must be alike.

    Raises ``ValueError`` for windows from within an episode if the tokenizer cannot decode these.
    """
    if tokenizer.temporal_stride == 1 or is_start.all():
        return tokenizer.decode(latents, **cache)
    if not decodes_windows(tokenizer):
        raise ValueError(
            f"{int((~is_start).sum())} of {len(is_start)} windows begin within an episode; this tokenizer, of temporal stride "
            f"{tokenizer.temporal_stride}, decodes from an episode's start only: choose windows that begin there"
        )
    windows = cast(WindowTokenizer, tokenizer)
    kinds = [(value, (is_start == value).nonzero()[:, 0]) for value in (True, False)]
    parts = [windows.decode(latents[rows.to(latents.device)], is_start=value, **cache) for value, rows in kinds if len(rows)]
    order = torch.cat([rows for _, rows in kinds]).argsort()
    return torch.cat(parts)[order.to(parts[0].device)]
