"""Videos without actions: every file below a folder is one episode whose actions are not known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamer.data.actions import as_action_space
from dreamer.data.alignment import episode_without_actions
from dreamer.data.readers.files import first_readable
from dreamer.data.readers.frames import check_size, decode_frames, frame_rate
from dreamer.types import ActionComponent, ActionSpace, Episode

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm", ".avi"}
UNLABELLED = ActionSpace((ActionComponent("action", "categorical", 1),))


class VideoReader:
    """Reads videos, each frame scaled to ``size`` (height, width), whatever its shape.

    action_space: of the labelled recordings that these are to be trained with, as ``as_action_space`` takes it: ``"vpt"`` (default: one
    that holds nothing).
    frames_per_second: default: the rate of the first video that can be opened, which the others must share. max_frames: longer videos
    are refused.
    """

    name = "video"

    def __init__(
        self,
        path: Path | str,
        *,
        size: Sequence[int] = (64, 64),
        action_space: ActionSpace | str | Sequence[Any] | None = None,
        frames_per_second: float | None = None,
        max_frames: int = 50_000,
    ) -> None:
        self.size, self.max_frames = check_size(size), max_frames
        self.action_space = UNLABELLED if action_space is None else as_action_space(action_space)
        self._must_share_rate = frames_per_second is None
        self.frames_per_second = frames_per_second or first_readable(frame_rate, self.find(Path(path)))

    def find(self, path: Path) -> list[Path]:
        """Every video at or below ``path``. Raises ``ValueError`` if there is none."""
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path}: no videos here; expected files that end in {', '.join(sorted(SUFFIXES))}")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode, all actions masked. Raises ``ValueError`` naming a file that is cut, unreadable, too long, or of another rate."""
        if self._must_share_rate and abs(frame_rate(recording) / self.frames_per_second - 1) > 0.01:
            raise ValueError(
                f"{recording}: {frame_rate(recording):g} frames per second, the first video has {self.frames_per_second:g}; "
                "convert it, import it into another store, or give frames_per_second"
            )
        return episode_without_actions(decode_frames(recording, self.size, self.max_frames), self.action_space.num_columns)
