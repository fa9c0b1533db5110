"""Episodes to latents, once, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from dreamer.data.alignment import chunk_actions, chunk_rewards, chunk_terminals, num_latent_steps
from dreamer.data.prefetch import Prefetcher
from dreamer.data.shards import STORE_FILE
from dreamer.data.store import EpisodeStore, LatentStore, LatentWriter
from dreamer.types import Tokenizer

Segment = tuple[UInt8[np.ndarray, "F C H W"], int]  # frames, and how many leading latent steps to drop


def pretokenize(
    store: EpisodeStore,
    tokenizer: Tokenizer,
    path: Path | str,
    *,
    batch_frames: int = 256,
    overlap_steps: int = 0,
    device: torch.device | str = "cpu",
    dtype: Literal["float32", "float16"] = "float32",
    shard_episodes: int = 32,
    max_episodes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentStore:
    """Encode every episode and write a ``LatentStore``. Run again after an interruption (or after more episodes were recorded)
    to go on after the last finished shard; the result is the same as without the interruption, byte for byte.

    batch_frames: at most this many frames are encoded at once; longer episodes go in segments. overlap_steps: latent steps that
    a segment repeats from the one before and drops again, so that a tokenizer with a memory knows the past (with temporal
    stride P > 1 at least one, as a first step stands for a single frame). progress(done, total) is called after each episode.

    Raises ``ValueError`` if the latents there were made by another tokenizer or from other episodes, or if the tokenizer's output
    has another shape than it promises.
    """
    path, stride = Path(path), tokenizer.temporal_stride
    overlap = max(overlap_steps, 1 if stride > 1 else 0)
    _check(store, tokenizer, batch_frames, overlap)
    total = len(store) if max_episodes is None else min(max_episodes, len(store))
    done = _resume(path, store, tokenizer)
    writer = LatentWriter(
        path,
        action_space=store.action_space,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        token_grid=tokenizer.token_grid,
        latent_channels=tokenizer.latent_channels,
        temporal_stride=stride,
        source_fingerprint="",
        dtype=dtype,
        shard_episodes=shard_episodes,
        extra={"frames_per_second": store.fps, "source": store.extra, "batch_frames": batch_frames, "overlap_steps": overlap},
    )

    segments = (s for episode in range(done, total) for s in _segments(store, episode, batch_frames, overlap, stride))
    with writer, Prefetcher(segments, 4) as decoded:  # decodes ahead while the tokenizer works
        for episode in range(done, total):
            rows = store.arrays(episode)
            parts, steps = [], num_latent_steps(int(store.lengths[episode]), stride)
            while sum(map(len, parts)) < steps:
                frames, drop = next(decoded)
                parts.append(_encode(tokenizer, frames, device)[drop:])
            writer.source_fingerprint = store.fingerprint(episode + 1)
            writer.add(
                np.concatenate(parts),
                *chunk_actions(rows["actions"], rows["action_mask"], stride),
                chunk_rewards(rows["rewards"], stride),
                chunk_terminals(rows["terminals"], stride),
                int(store.tasks[episode]),
                bool(store.has_rewards[episode]),
            )
            if progress:
                progress(episode + 1, total)
    return LatentStore(path)


def _check(store: EpisodeStore, tokenizer: Tokenizer, batch_frames: int, overlap: int) -> None:
    if tuple(store.frame_shape) != tuple(tokenizer.frame_shape):
        raise ValueError(f"{store.path}: frames of shape {store.frame_shape}; the tokenizer takes {tuple(tokenizer.frame_shape)}")
    least = 1 + (overlap + 1) * tokenizer.temporal_stride
    if batch_frames < least:
        raise ValueError(f"batch_frames is {batch_frames}; with an overlap of {overlap} latent steps it must be at least {least}")


def _resume(path: Path, store: EpisodeStore, tokenizer: Tokenizer) -> int:
    """How many episodes are done. Raises ``ValueError`` if what is there does not belong to this store and tokenizer."""
    if not (path / STORE_FILE).exists():
        return 0
    found = LatentStore(path)
    found.check_tokenizer(tokenizer.fingerprint())
    if len(found) and (len(found) > len(store) or found.source_fingerprint != store.fingerprint(len(found))):
        raise ValueError(f"{path}: holds latents of other episodes than {store.path}; pretokenize into another folder")
    return len(found)


def _segments(store: EpisodeStore, episode: int, batch_frames: int, overlap: int, stride: int) -> Iterator[Segment]:
    """Overlapping runs of at most ``batch_frames`` frames that begin where a latent step ends (frame Pt)."""
    length, start, drop = int(store.lengths[episode]), 0, 0
    while True:
        stop = min(start + 1 + (batch_frames - 1) // stride * stride, length)
        yield store.frames(episode, start, stop), drop
        if stop == length:
            return
        steps = (stop - 1) // stride + 1  # latent steps finished so far
        start, drop = (steps - overlap) * stride, overlap


@torch.no_grad()
def _encode(tokenizer: Tokenizer, frames: UInt8[np.ndarray, "F C H W"], device: torch.device | str) -> Float32[np.ndarray, "T N Z"]:
    latents = tokenizer.encode(torch.from_numpy(frames)[None].to(device))
    rows, columns = tokenizer.token_grid
    expected = (1, num_latent_steps(len(frames), tokenizer.temporal_stride), rows * columns, tokenizer.latent_channels)
    if tuple(latents.shape) != expected:
        raise ValueError(f"tokenizer: {len(frames)} frames gave latents of shape {tuple(latents.shape)}; expected {expected}")
    return latents[0].float().cpu().numpy()
