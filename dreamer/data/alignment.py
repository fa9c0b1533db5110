"""The only place that shifts time. The contract is the table in ``dreamer/types.py``.

A tokenizer of temporal stride P turns F frames into T = 1 + ceil((F - 1) / P) latent steps. Step 0 is frame 0; step t >= 1
stands for frames P(t-1)+1 .. Pt. With P = 3 and F = 7:

=======  ==============  ============================  ===================  =====================
step t   its frames      ``actions[t]`` taken at       ``prev_actions[t]``  ``rewards[t]`` sums
=======  ==============  ============================  ===================  =====================
0        0               0 1 2                         none                 r0
1        1 2 3           3 4 5                         0 1 2                r1 r2 r3
2        4 5 6           6, then masked                3 4 5                r4 r5 r6
=======  ==============  ============================  ===================  =====================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from dreamer.types import Episode


def num_latent_steps(num_frames: int, stride: int) -> int:
    """T = 1 + ceil((F - 1) / P)."""
    if num_frames < 1 or stride < 1:
        raise ValueError(f"{num_frames} frames with temporal stride {stride}; expected at least 1 of each")
    return 1 + -(-(num_frames - 1) // stride)


def episode_from_transitions(
    frames: UInt8[np.ndarray, "F C H W"],
    actions: Shaped[np.ndarray, "K A"],
    rewards: Shaped[np.ndarray, " K2"],
    terminated: bool,
    *,
    action_mask: Bool[np.ndarray, " K3"] | None = None,
    task: int = 0,
    info: dict[str, Any] | None = None,
) -> Episode:
    """An episode from F frames and the F - 1 transitions between them: ``actions[i]`` and ``rewards[i]`` lead from frame i
    to i + 1 (what a Gymnasium loop gives). The action at the last frame is not known: masked, zeros.

    Raises ``ValueError`` unless there is exactly one transition fewer than frames.
    """
    num = len(frames) - 1
    if len(actions) != num or len(rewards) != num:
        raise ValueError(f"{len(frames)} frames need {num} actions and rewards; got {len(actions)} actions and {len(rewards)} rewards")
    mask = np.ones(num, bool) if action_mask is None else action_mask
    return Episode(
        frames=frames,
        actions=np.concatenate([actions, np.zeros((1, actions.shape[1]))]).astype(np.float32),
        action_mask=np.append(mask, False),
        rewards=np.concatenate([[0], rewards]).astype(np.float32),
        terminals=np.arange(num + 1) == (num if terminated else -1),
        task=task,
        info=dict(info or {}),
    )


def episode_from_steps(
    frames: UInt8[np.ndarray, "F C H W"],
    actions: Shaped[np.ndarray, "F1 A"],
    rewards: Shaped[np.ndarray, " F2"],
    *,
    task: int = 0,
    info: dict[str, Any] | None = None,
) -> Episode:
    """An episode from recordings that hold one action and one reward for every frame: ``actions[i]`` is taken at frame i and
    ``rewards[i]`` is caused by it, so it belongs to frame i + 1. The last reward has no frame; it is kept under
    ``info["reward_after_end"]``. Raises ``ValueError`` unless the three lengths are equal."""
    if not len(frames) == len(actions) == len(rewards):
        raise ValueError(f"lengths disagree: {len(frames)} frames, {len(actions)} actions, {len(rewards)} rewards; expected the same")
    return Episode(
        frames=frames,
        actions=actions.astype(np.float32),
        action_mask=np.ones(len(frames), bool),
        rewards=np.concatenate([[0], rewards[:-1]]).astype(np.float32),
        terminals=np.zeros(len(frames), bool),
        task=task,
        info={**(info or {}), "reward_after_end": float(rewards[-1])},
    )


def episode_without_rewards(
    frames: UInt8[np.ndarray, "F C H W"],
    actions: Shaped[np.ndarray, "F1 A"],
    *,
    action_mask: Bool[np.ndarray, " F2"] | None = None,
    info: dict[str, Any] | None = None,
) -> Episode:
    """An episode from recordings that hold an action for every frame, ``actions[i]`` taken at frame i, and no rewards: ``has_rewards``
    is False. Actions where ``action_mask`` is False are set to 0. Raises ``ValueError`` unless the lengths are equal."""
    mask = np.ones(len(frames), bool) if action_mask is None else action_mask
    if not len(frames) == len(actions) == len(mask):
        raise ValueError(f"lengths disagree: {len(frames)} frames, {len(actions)} actions, a mask of {len(mask)}; expected the same")
    return Episode(
        frames=frames,
        actions=np.where(mask[:, None], actions, 0).astype(np.float32),
        action_mask=mask,
        rewards=np.zeros(len(frames), np.float32),
        terminals=np.zeros(len(frames), bool),
        has_rewards=False,
        info=dict(info or {}),
    )


def episode_without_actions(frames: UInt8[np.ndarray, "F C H W"], num_columns: int, info: dict[str, Any] | None = None) -> Episode:
    """An episode of which only the frames are known: every action is masked, and ``has_rewards`` is False."""
    length = len(frames)
    return Episode(
        frames=frames,
        actions=np.zeros((length, num_columns), np.float32),
        action_mask=np.zeros(length, bool),
        rewards=np.zeros(length, np.float32),
        terminals=np.zeros(length, bool),
        has_rewards=False,
        info=dict(info or {}),
    )


def chunk_actions(
    actions: Float[np.ndarray, "F A"], mask: Bool[np.ndarray, " F"], stride: int
) -> tuple[Float[np.ndarray, "T P A"], Bool[np.ndarray, "T P"]]:
    """Step t gets the P actions taken at frames Pt .. Pt+P-1; those past the end are masked zeros."""
    steps = num_latent_steps(len(actions), stride)
    chunks = np.zeros((steps * stride, actions.shape[1]), np.float32)
    known = np.zeros(steps * stride, bool)
    chunks[: len(actions)], known[: len(actions)] = actions, mask
    return chunks.reshape(steps, stride, -1), known.reshape(steps, stride)


def linspace_actions(
    actions: Float[np.ndarray, "F A"], mask: Bool[np.ndarray, " F"], stride: int
) -> tuple[Float[np.ndarray, "T 1 A"], Bool[np.ndarray, "T 1"]]:
    """One action a latent step, spread evenly over the frames and rounded down: ``linspace(0, F - 1, T)``. The others are lost.

    Where P divides F - 1 these are the actions at frames 0, P, 2P, ..., the first of each of ``chunk_actions``; elsewhere actions taken up
    to P - 1 frames earlier (F = 32 and P = 8: frames 0 7 15 23 31).
    """
    index = torch.linspace(0, len(actions) - 1, num_latent_steps(len(actions), stride)).long().numpy()
    return actions[index][:, None].astype(np.float32), mask[index][:, None]


def chunk_rewards(rewards: Float[np.ndarray, " F"], stride: int) -> Float[np.ndarray, " T"]:
    """Each latent step's reward is the sum over its frames."""
    return np.add.reduceat(rewards, _first_frames(len(rewards), stride)).astype(np.float32)


def chunk_terminals(terminals: Bool[np.ndarray, " F"], stride: int) -> Bool[np.ndarray, " T"]:
    """A latent step is terminal if any of its frames is."""
    return np.logical_or.reduceat(terminals, _first_frames(len(terminals), stride))


def _first_frames(num_frames: int, stride: int) -> np.ndarray:
    """The first frame of each latent step: 0, 1, P+1, 2P+1, ..."""
    return np.append(0, np.arange(1, num_frames, stride))


def shift_actions(
    actions: Float[np.ndarray, "T P A"], mask: Bool[np.ndarray, "T P"]
) -> tuple[Float[np.ndarray, "T P A"], Bool[np.ndarray, "T P"]]:
    """``prev_actions[t] = actions[t - 1]``: what led into step t. Step 0 has none: masked, zeros."""
    prev, prev_mask = np.zeros_like(actions), np.zeros_like(mask)
    prev[1:], prev_mask[1:] = actions[:-1], mask[:-1]
    return prev, prev_mask


def mtp_targets(x: Shaped[Tensor, "B T ..."], num_distances: int) -> tuple[Shaped[Tensor, "B T M ..."], Bool[Tensor, "B T M"]]:
    """Targets of multi-token prediction: ``target[:, t, n] = x[:, t + n]`` for n = 0 .. M-1. The mask is False past the end,
    where the target repeats the last step (a legal value for any loss, to be masked)."""
    if num_distances < 1:
        raise ValueError(f"num_distances is {num_distances}; expected at least 1")
    batch, steps = x.shape[:2]
    index = torch.arange(steps, device=x.device)[:, None] + torch.arange(num_distances, device=x.device)
    mask = (index < steps).expand(batch, steps, num_distances)
    return x[:, index.clamp(max=steps - 1)], mask
