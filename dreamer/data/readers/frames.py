"""Videos to frames of one size, counted by decoding: headers have been seen to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import av.error
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

MAX_PIXELS = 1 << 26  # of a frame as it is stored
MAX_SIDE = 4096  # of a frame as it is read

# Draws on frame t, or gives None: the frame stays as it is.
Paint = Callable[[int, av.VideoFrame], UInt8[np.ndarray, "H W 3"] | None]


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the frames that a reader is to give. Raises ``ValueError`` for anything else."""
    is_list = isinstance(size, Sequence) and not isinstance(size, str)
    if not is_list or len(size) != 2 or any(type(n) is not int or not 0 < n <= MAX_SIDE for n in size):
        raise ValueError(f"size is {size!r}; expected [height, width] in pixels, each in [1, {MAX_SIDE}]")
    return size[0], size[1]


def decode_frames(file: Path, size: tuple[int, int], max_frames: int, paint: Paint | None = None) -> UInt8[np.ndarray, "F 3 H W"]:
    """Every frame of a video, scaled to ``size`` (height, width) whatever its shape by averaging over areas.

    ``paint`` may draw on a frame before it is scaled. Raises ``ValueError`` naming the file if it cannot be decoded to its end, holds
    no frame, or more than ``max_frames``.
    """
    frames: list[np.ndarray] = []
    plain, painted = VideoReformatter(), VideoReformatter()  # one for all frames: four times as fast as frame.to_ndarray
    height, width = size
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:  # in spite of what PyAV's types say
                raise ValueError(f"{file}: cannot be decoded: its codec is not known; convert it or move it away")
            stream.codec_context.thread_count = 2
            for frame in container.decode(stream):
                if len(frames) == max_frames:
                    raise ValueError(f"{file}: more than {max_frames} frames; cut it, or raise max_frames")
                if frame.width * frame.height > MAX_PIXELS:
                    raise ValueError(f"{file}: frames of {frame.width}x{frame.height}; expected at most {MAX_PIXELS} pixels")
                drawn = None if paint is None else paint(len(frames), frame)
                source = frame if drawn is None else av.VideoFrame.from_ndarray(drawn, format="rgb24")
                reformatter = plain if drawn is None else painted
                rgb = reformatter.reformat(source, width, height, "rgb24", interpolation=Interpolation.AREA)
                frames.append(rgb.to_ndarray().transpose(2, 0, 1))
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{file}: cannot be decoded after {len(frames)} frames ({error}); repair it or move it away") from error
    if not frames:
        raise ValueError(f"{file}: holds no frame that can be decoded; repair it or move it away")
    if (missing := missing_bytes(file)) > 0:
        raise ValueError(
            f"{file}: cannot be decoded after {len(frames)} frames (its last {missing} bytes are missing); repair it or move it away"
        )
    return np.stack(frames)


def missing_bytes(file: Path) -> int:
    """How much of an mp4 was cut off. With its index in front, as in files made for streaming, the rest decodes without an error."""
    end, place = file.stat().st_size, 0
    with file.open("rb") as stream:
        while place + 8 <= end:  # from box to box
            stream.seek(place)
            head = stream.read(16)
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:], "big") if size == 1 else size or end - place
            if size < 8 or (place == 0 and head[4:8] != b"ftyp"):
                return 0  # another format
            place += size
    return max(0, place - end)


def resize_frames(frames: UInt8[np.ndarray, "F H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "F 3 H2 W2"]:
    """Frames scaled to ``size`` (height, width) as ``decode_frames`` does it."""
    reformatter, (height, width) = VideoReformatter(), size
    scaled = np.empty((len(frames), 3, height, width), np.uint8)
    for out, frame in zip(scaled, frames, strict=True):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        rgb = reformatter.reformat(picture, width, height, "rgb24", interpolation=Interpolation.AREA)
        out[:] = rgb.to_ndarray().transpose(2, 0, 1)
    return scaled


def frame_rate(file: Path) -> float:
    """Frames per second as the header says. Raises ``ValueError`` naming the file if it cannot be opened or says nothing."""
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{file}: not a video that can be opened ({error}); repair it or move it away") from error
    if not rate:
        raise ValueError(f"{file}: says nothing about its frame rate; give frames_per_second")
    return float(rate)
