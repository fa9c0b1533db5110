"""MineRL's recordings of people who play Minecraft (arXiv 1907.13440), as MineRL 0.4 and the v3 data before it have them::

    <root>/MineRL<Name>-v0/v4_<stream>/recording.mp4   the pixels; also more of them than belong to the episode
                                       rendered.npz    reward (N,), action$* (N,), observation$* (N + 1,), 20 a second
                                       metadata.json   success, duration_steps (N), true_video_frame_count, ...

``action[t]`` and ``reward[t]`` lead from state t to t + 1. The video begins before the episode and ends with it, so its last N + 1
frames are the episode's. Actions become ``MINERL``: eight keys and the camera as one of 121 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.data.alignment import episode_from_transitions
from dreamer.data.checks import check_episode
from dreamer.data.minecraft import minerl_columns
from dreamer.data.readers.files import load_json, load_npz, npz_shapes, refuse
from dreamer.data.readers.frames import check_size, decode_frames
from dreamer.ops.minecraft import MINERL, MINERL_ITEMS
from dreamer.types import Episode

# Streams that nobody can repair. MineRL's own loader leaves them out too (minerl/data/assets/blacklist.txt).
KNOWN_BAD = {"tempting_capers_shapeshifter-14": "known to be corrupt; MineRL's own list of bad streams names it"}
OBFUSCATED = "its actions are obfuscated vectors (VectorObf), which name no key; use the same environment without VectorObf in its name"


class MineRLReader:
    """Reads the layout above, each frame scaled to ``size`` (height, width).

    Navigate's ``place`` and Obtain's ``place, equip, craft, nearbyCraft, nearbySmelt`` are dropped, and ``info["dropped_actions"]`` says in
    how many ticks each was used; with ``item_actions`` they are kept, a categorical component each. The observations beside the
    pixels (inventory, compass) are not read. A successful episode ended by itself, any other by its time or its player.
    """

    name = "minerl"
    frames_per_second = 20.0

    def __init__(self, path: Path | str, *, size: Sequence[int] = (64, 64), item_actions: bool = False, max_frames: int = 50_000) -> None:
        self.size, self.item_actions, self.max_frames = check_size(size), item_actions, max_frames
        self.action_space = MINERL_ITEMS if item_actions else MINERL
        self.skipped: dict[Path, str] = {}  # recordings that ``find`` left out, with the reason

    def find(self, path: Path) -> list[Path]:
        """Every folder at or below ``path`` that holds rendered.npz, but for those that are known to be of no use: these are put in
        ``skipped``. Raises ``ValueError`` if nothing is left."""
        folders = sorted(p.parent for p in path.rglob("rendered.npz"))
        self.skipped = {folder: reason for folder in folders if (reason := _useless(folder))}
        found = [folder for folder in folders if folder not in self.skipped]
        if not found:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in list(self.skipped.items())[:3])
            expected = "expected folders that hold recording.mp4, rendered.npz and metadata.json"
            raise ValueError(f"{path}: no recordings here{f' that can be used ({reasons})' if reasons else ''}; {expected}")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode. Raises ``ValueError`` naming the file for anything missing, unreadable, obfuscated, or of another length."""
        if reason := _useless(recording):
            raise ValueError(f"{recording}: {reason}")
        rendered = recording / "rendered.npz"
        actions, rewards = _transitions(rendered)
        metadata = _Metadata(recording / "metadata.json")
        if metadata.duration not in (None, len(rewards)):
            refuse(rendered, f"{len(rewards)} rewards", f"duration_steps = {metadata.duration}, as metadata.json says")
        columns, dropped = minerl_columns(actions, str(rendered), item_actions=self.item_actions)
        if len(columns) != len(rewards):
            refuse(rendered, f"{len(columns)} actions", f"as many as rewards, {len(rewards)}")
        frames, num_before = self._frames(recording / "recording.mp4", len(rewards) + 1, metadata.num_frames)
        info = {"environment": recording.parent.name, "stream": recording.name, "success": metadata.success}
        info |= {"leading_frames_skipped": num_before} | ({"dropped_actions": dropped} if dropped else {})
        episode = episode_from_transitions(frames, columns, rewards, metadata.success, info=info)
        check_episode(episode, self.action_space, str(rendered))
        return episode

    def _frames(self, file: Path, num_states: int, num_frames: int | None) -> tuple[np.ndarray, int]:
        """The episode's frames, and how many came before them. ``num_frames``: how many the video has, as metadata.json says."""
        frames = decode_frames(file, self.size, self.max_frames)
        num_frames = len(frames) if num_frames is None else num_frames
        if not num_states <= num_frames <= len(frames):
            expected = f"true_video_frame_count = {num_frames}, as metadata.json says, and at least the episode's {num_states}"
            refuse(file, f"{len(frames)} frames", expected)
        return frames[num_frames - num_states : num_frames], num_frames - num_states


def _useless(folder: Path) -> str | None:
    """Why a stream is left out whatever its files hold."""
    bad = next((reason for stream, reason in KNOWN_BAD.items() if folder.name.endswith(stream)), None)
    return bad or (OBFUSCATED if "VectorObf" in folder.parent.name else None)


def _transitions(file: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The N actions by name and the N rewards; the N + 1 observations are only counted."""
    shapes = npz_shapes(file)
    actions = {key.removeprefix("action$"): key for key in shapes if key.startswith("action$")}
    if set(actions) == {"vector"}:
        raise ValueError(f"{file}: {OBFUSCATED}")
    if "reward" not in shapes:
        refuse(file, f"the arrays {sorted(shapes)[:8]}", "reward, action$* and observation$*")
    arrays = load_npz(file, ["reward", *actions.values()])
    rewards = arrays["reward"]
    if rewards.ndim != 1 or len(rewards) == 0 or rewards.dtype.kind not in "fiub" or not np.isfinite(rewards).all():
        refuse(file, f"reward {rewards.dtype} {rewards.shape}", "finite numbers (N,), at least one")
    for key, shape in shapes.items():
        if key.startswith("observation$") and shape[:1] != (len(rewards) + 1,):
            refuse(file, f"{key} of shape {shape}", f"one row more than rewards, {len(rewards) + 1}")
    return {name: arrays[key] for name, key in actions.items()}, rewards


class _Metadata:
    """What metadata.json says. Raises ``ValueError`` naming it if a value has another type than MineRL writes."""

    def __init__(self, file: Path) -> None:
        values = load_json(file)
        if not isinstance(values, dict):
            refuse(file, type(values).__name__, "an object with success, duration_steps and true_video_frame_count")
        success = values.get("success", False)
        if success in ("True", "False"):  # v3 writes text
            success = success == "True"
        if not isinstance(success, bool):
            refuse(file, f"success = {success!r}", "true or false")
        self.success = success
        self.duration = _count(file, values, "duration_steps")
        self.num_frames = _count(file, values, "true_video_frame_count")


def _count(file: Path, values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is not None and (type(value) is not int or value < 0):
        refuse(file, f"{name} = {value!r}", "a whole number")
    return value
