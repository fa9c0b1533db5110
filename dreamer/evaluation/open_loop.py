"""Open-loop dreams of recorded windows: what the world model makes of the same actions, of other actions, and how close it comes.

Shape letters: B windows, T latent steps, F frames, P frames and actions per latent step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor

from dreamer.data import EpisodeStore, LatentStore, PretokenizedDataset
from dreamer.data.pretokenized_dataset import Ids
from dreamer.evaluation.video import (
    COPY_LAST_FRAME,
    RECONSTRUCTION,
    SHUFFLED_ACTIONS,
    TRUE_ACTIONS,
    WorldModelResult,
    copy_last_frame,
    score_open_loop,
)
from dreamer.imagination import Sampler
from dreamer.imagination.tokenizers import decode_windows, decodes_windows
from dreamer.models import Agent
from dreamer.types import Batch, Config, Tokenizer

BATCH = 32  # windows that are dreamed or decoded at once

_log = logging.getLogger(__name__)


class WorldModelEvaluationConfig(Config):
    context: int = Field(default=8, ge=1)  # recorded latent steps before the dream
    horizon: int = Field(default=16, ge=1)  # dreamed latent steps
    num_windows: int = Field(default=64, ge=2)  # of held-out episodes
    num_training_windows: int | None = Field(default=None, ge=2)  # of training episodes, scored beside them; null: none
    num_clips: int = Field(default=6, ge=1)  # kept as pictures for the report


@dataclass(frozen=True)
class Windows:
    """The same windows as frames and as latents. A window of T latent steps from step t on of its episode shows the frames Pt .. P(t+T-1):
    of its first step the last frame, of every other all P."""

    frames: UInt8[Tensor, "B F C H W"]
    batch: Batch
    episodes: Int[np.ndarray, " B"]  # that each comes from
    starts: Int[np.ndarray, " B"]  # latent step of its episode that each begins with

    @property
    def is_start(self) -> Bool[Tensor, " B"]:
        """Whether each begins at its episode's start."""
        return torch.from_numpy(self.starts == 0)


def draw_windows(
    frames: EpisodeStore, latents: LatentStore, episodes: Ids, *, tokenizer: Tokenizer, num_steps: int, num_windows: int, seed: int
) -> Windows:
    """``num_windows`` windows of ``num_steps`` latent steps, spread evenly over ``episodes``, at places that ``seed`` decides.

    Steps that the end of an episode left unfinished are in no window. A tokenizer that cannot decode from within an episode gets windows
    that begin at the episode's start. Raises ``ValueError`` if no episode is long enough.
    """
    ids, stride = np.asarray(episodes), latents.temporal_stride
    num_whole = 1 + (frames.lengths - 1) // stride  # latent steps that all their frames are there for
    long = ids[num_whole[ids] >= num_steps]
    if len(long) == 0:
        longest = int(num_whole[ids].max(initial=0))
        raise ValueError(f"{latents.path}: windows of {num_steps} steps do not fit: the longest episode to draw from has {longest}")
    rng = np.random.default_rng(seed)
    if len(long) == 2:  # an odd number could not trade actions between the two
        num_windows -= num_windows % 2
    chosen = np.resize(rng.permutation(long), num_windows)
    starts = [int(rng.integers(num_whole[e] - num_steps + 1)) if decodes_windows(tokenizer) else 0 for e in chosen]
    rows = list(zip(chosen.tolist(), starts, strict=True))
    pictures = [frames.frames(e, stride * start, stride * (start + num_steps - 1) + 1) for e, start in rows]
    batch = PretokenizedDataset(latents, num_steps, long).batch(rows)
    return Windows(torch.from_numpy(np.stack(pictures)), batch, chosen, np.array(starts))


def other_windows(
    episodes: Int[np.ndarray, " B"], starts: Int[np.ndarray, " B"], num_steps: int, generator: torch.Generator
) -> Int[Tensor, " B"] | None:
    """For each row another one, of another episode; every row is chosen once. ``ValueError`` if one of several episodes fills over half
    of them.

    Where all are of one episode: a row at least ``num_steps`` latent steps earlier or later in it. None if they lie too close for that.
    """
    count, most = len(episodes), int(np.unique(episodes, return_counts=True)[1].max())
    if most == count:
        ring = np.argsort(starts, kind="stable")
        shift = _widest_shift(starts[ring], num_steps)
        if shift is None:
            _log.warning(
                "no shuffled actions: windows of one episode, nearer than %d steps; take more windows or a shorter horizon", num_steps
            )
            return None
    elif 2 * most > count:
        raise ValueError(f"{most} of {count} windows are of one episode; shuffling actions needs windows of several held-out episodes")
    else:
        ring = np.argsort(episodes, kind="stable")  # rows of one episode stand together
        shift = int(torch.randint(most, count - most + 1, (), generator=generator))
    other = np.empty(count, np.int64)
    other[ring] = np.roll(ring, shift)
    return torch.from_numpy(other)


def _widest_shift(places: Int[np.ndarray, " B"], apart: int) -> int | None:
    """By how many rows to turn the ring of ``places`` so that those that meet are as far apart as can be; None if that is not at least
    ``apart``."""
    distances = [int(np.abs(places - np.roll(places, shift)).min()) for shift in range(len(places))]
    widest = int(np.argmax(distances))
    return widest if distances[widest] >= apart else None


@torch.no_grad()
def dream(
    sampler: Sampler,
    tokenizer: Tokenizer,
    batch: Batch,
    is_start: Bool[Tensor, " B"],
    context: int,
    prev_actions: Float[Tensor, "B T P A"],
    prev_action_mask: Bool[Tensor, "B T P"],
    seed: int,
) -> UInt8[Tensor, "B F C H W"]:
    """Frames of the batch's first ``context`` latent steps, then of what the sampler dreams with the given actions."""
    device = sampler.dynamics.device
    clips = []
    for start in range(0, len(batch.latents), BATCH):
        rows = slice(start, start + BATCH)
        generator = torch.Generator(device).manual_seed(seed + start)
        past = batch.latents[rows, :context].to(device)
        actions, known = prev_actions[rows].to(device), prev_action_mask[rows].to(device)
        dreamed = sampler.generate(past, actions, known, task=batch.task[rows].to(device), generator=generator)
        clips.append(decode_windows(tokenizer, torch.cat([past, dreamed], dim=1), is_start[rows]).cpu())
    return torch.cat(clips)


@torch.no_grad()
def decode(
    tokenizer: Tokenizer, latents: Float[Tensor, "B T N Z"], is_start: Bool[Tensor, " B"], device: torch.device
) -> UInt8[Tensor, "B F C H W"]:
    """Frames of windows; ``is_start`` as in ``Windows``."""
    parts = zip(latents.split(BATCH), is_start.split(BATCH), strict=True)
    return torch.cat([decode_windows(tokenizer, part.to(device), begins).cpu() for part, begins in parts])


@torch.no_grad()
def predict(agent: Agent, tokenizer: Tokenizer, sampler: Sampler, windows: Windows, context: int, seed: int) -> dict[str, Tensor]:
    """Whole clips by name (uint8, B F C H W); all but the reconstruction show the same context.

    Shuffled: the actions after the context are those of another window, as ``other_windows`` chooses it (left out where it finds none);
    both dreams start from the same noise.
    """
    batch, is_start = windows.batch, windows.is_start
    first = 1 + tokenizer.temporal_stride * (context - 1)  # frames of the context
    horizon = windows.frames.shape[1] - first
    clips = {TRUE_ACTIONS: dream(sampler, tokenizer, batch, is_start, context, batch.prev_actions, batch.prev_action_mask, seed)}
    num_dreamed = batch.latents.shape[1] - context
    other = other_windows(windows.episodes, windows.starts, num_dreamed, torch.Generator().manual_seed(seed))
    if other is not None:
        actions, known = batch.prev_actions.clone(), batch.prev_action_mask.clone()
        actions[:, context:], known[:, context:] = actions[other, context:], known[other, context:]
        clips[SHUFFLED_ACTIONS] = dream(sampler, tokenizer, batch, is_start, context, actions, known, seed)
    clips[COPY_LAST_FRAME] = torch.cat([windows.frames[:, :first], copy_last_frame(windows.frames[:, :first], horizon)], dim=1)
    clips[RECONSTRUCTION] = decode(tokenizer, batch.latents, is_start, agent.dynamics.device)
    return clips


def score(windows: Windows, predictions: dict[str, Tensor], *, context: int, stride: int, fps: float, seed: int) -> WorldModelResult:
    """PSNR and SSIM of the frames after the context, with intervals over episodes."""
    first = 1 + stride * (context - 1)
    dreamed = {name: clip[:, first:] for name, clip in predictions.items()}
    return score_open_loop(windows.frames[:, first:], dreamed, context=first, fps=fps, episode_ids=windows.episodes.tolist(), seed=seed)
