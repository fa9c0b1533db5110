"""What an episode must be like before it is stored."""

from __future__ import annotations

import numpy as np

from dreamer.types import ActionSpace, Episode


def check_episode(episode: Episode, action_space: ActionSpace, where: str) -> None:
    """Raise ``ValueError`` naming ``where`` and the field unless the episode keeps the time contract."""
    frames, length = episode.frames, len(episode.frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.size == 0:
        raise ValueError(f"{where}: frames are {frames.dtype} {frames.shape}; expected uint8 (F, C, H, W), at least one")
    expected = {
        "actions": (np.float32, (length, action_space.num_columns)),
        "action_mask": (np.bool_, (length,)),
        "rewards": (np.float32, (length,)),
        "terminals": (np.bool_, (length,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(episode, name)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{where}: {name} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape} beside {length} frames")
    if not np.isfinite(episode.rewards).all():
        raise ValueError(f"{where}: rewards[{int(np.argmin(np.isfinite(episode.rewards)))}] is not finite")
    if episode.rewards[0] != 0:
        raise ValueError(
            f"{where}: rewards[0] is {episode.rewards[0]}; expected 0, no action led to frame 0 (see dreamer/data/alignment.py)"
        )
    if episode.terminals[:-1].any():
        raise ValueError(
            f"{where}: terminals[{int(np.argmax(episode.terminals))}] of {length} is True; only the last frame can be terminal"
        )
    unknown = episode.actions[~episode.action_mask]
    if not (unknown == 0).all():
        raise ValueError(f"{where}: actions that action_mask calls unknown are not zero; set them to 0")
    action_space.validate(episode.actions[episode.action_mask], where)
