"""Videos without actions: every file below a folder is one episode whose actions are not known."""

from __future__ import annotations

from pathlib import Path

import av
import av.error
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from pydantic import PositiveFloat, PositiveInt

from dreamer.data.alignment import episode_without_actions
from dreamer.data.readers.options import ActionSpaceOption, check_options
from dreamer.types import ActionComponent, ActionSpace, Episode

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm", ".avi"}
UNLABELLED = ActionSpace((ActionComponent("action", "categorical", 1),))


class VideoReader:
    """Reads videos, each frame scaled to ``size`` (height, width), whatever its shape.

    action_space: of the labelled recordings that these are to be trained with (default: one that holds nothing).
    frames_per_second: default: the rate of the first video, which the others must share. max_frames: longer videos are refused.
    """

    name = "video"

    @check_options
    def __init__(
        self,
        path: Path | str,
        *,
        size: tuple[PositiveInt, PositiveInt] = (64, 64),
        action_space: ActionSpaceOption | None = None,
        frames_per_second: PositiveFloat | None = None,
        max_frames: PositiveInt = 50_000,
    ) -> None:
        self.size, self.max_frames = size, max_frames
        self.action_space = action_space or UNLABELLED
        self._must_share_rate = frames_per_second is None
        self.frames_per_second = frames_per_second or _rate(self.find(Path(path))[0])

    def find(self, path: Path) -> list[Path]:
        """Every video at or below ``path``. Raises ``ValueError`` if there is none."""
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path}: no videos here; expected files that end in {', '.join(sorted(SUFFIXES))}")
        return found

    def read(self, recording: Path) -> Episode:
        """One episode, all actions masked. Raises ``ValueError`` naming the file if it is cut, unreadable, too long, or has another rate.

        Frames are counted by decoding: headers have been seen to be wrong.
        """
        if self._must_share_rate and abs(_rate(recording) / self.frames_per_second - 1) > 0.01:
            raise ValueError(
                f"{recording}: {_rate(recording):g} frames per second, the first video has {self.frames_per_second:g}; "
                "convert it, import it into another store, or give frames_per_second"
            )
        frames: list[np.ndarray] = []
        reformatter = VideoReformatter()  # one for all frames: four times as fast as frame.to_ndarray
        height, width = self.size
        try:
            with av.open(str(recording)) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 2
                for frame in container.decode(stream):
                    if len(frames) == self.max_frames:
                        raise ValueError(f"{recording}: more than {self.max_frames} frames; cut it, or raise max_frames")
                    rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.AREA)
                    frames.append(rgb.to_ndarray().transpose(2, 0, 1))
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{recording}: cannot be decoded after {len(frames)} frames ({error}); repair it or move it away") from error
        if not frames:
            raise ValueError(f"{recording}: holds no frame that can be decoded; repair it or move it away")
        return episode_without_actions(np.stack(frames), self.action_space.num_columns)


def _rate(recording: Path) -> float:
    try:
        with av.open(str(recording)) as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{recording}: not a video that can be opened ({error}); repair it or move it away") from error
    if not rate:
        raise ValueError(f"{recording}: says nothing about its frame rate; give frames_per_second")
    return float(rate)
