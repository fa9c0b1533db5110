"""Videos to frames of one size, counted by decoding: headers have been seen to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from dreamer.data.readers.ends import missing_bytes

# Of a frame as it is stored: 8K just fits. FFmpeg itself is told, so that larger ones are refused before memory is asked for.
MAX_PIXELS = 1 << 25
MAX_SIDE = 4096  # of a frame as it is read
MAX_TOTAL_PIXELS = 1 << 37  # of all frames as they are stored: 8 hours of 640x360 at 20 a second
MAX_DECODED_BYTES = 8 << 30  # of all frames as they are read
MAX_STREAMS = 16
MAX_RATE = 1000.0  # frames per second
# Other formats that FFmpeg knows name further files or addresses to read (playlists, lists of parts), or are hardly ever tested.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
CODECS = {"av1", "ffv1", "h264", "hevc", "huffyuv", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v3", "prores", "rawvideo"}
CODECS |= {"theora", "vp8", "vp9"}
_LIMITS = {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
    "max_streams": str(MAX_STREAMS + 1),
}

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
    max_bytes, num_pixels = MAX_DECODED_BYTES // (3 * height * width), 0
    try:
        with _open(file) as (container, stream):
            for frame in container.decode(stream):
                num_pixels += frame.width * frame.height
                if len(frames) == max_frames:
                    raise ValueError(f"{file}: more than {max_frames} frames; cut it, or raise max_frames")
                if len(frames) == max_bytes or num_pixels > MAX_TOTAL_PIXELS:
                    raise ValueError(
                        f"{file}: more than {len(frames)} frames of {frame.width}x{frame.height}, read as {width}x{height}: too much for "
                        f"one recording ({MAX_TOTAL_PIXELS} pixels stored, {MAX_DECODED_BYTES} bytes read); cut it, or set a smaller size"
                    )
                drawn = None if paint is None else paint(len(frames), frame)
                source = frame if drawn is None else av.VideoFrame.from_ndarray(drawn, format="rgb24")
                reformatter = plain if drawn is None else painted
                rgb = reformatter.reformat(source, width, height, "rgb24", interpolation=Interpolation.AREA)
                frames.append(rgb.to_ndarray().transpose(2, 0, 1))
    except (av.error.FFmpegError, IndexError) as error:
        # what FFmpeg says of pictures beyond max_pixels
        large = f"; or its frames have more than the allowed {MAX_PIXELS} pixels" if isinstance(error, av.error.ArgumentError) else ""
        raise ValueError(f"{file}: cannot be decoded after {len(frames)} frames ({error}{large}); repair it or move it away") from error
    if not frames:
        raise ValueError(f"{file}: holds no frame that can be decoded; repair it or move it away")
    if (missing := missing_bytes(file)) > 0:
        raise ValueError(
            f"{file}: cannot be decoded after {len(frames)} frames (its last {missing} bytes are missing); repair it or move it away"
        )
    return np.stack(frames)


@contextmanager
def _open(file: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, which has a codec that is known and frames of a size that is allowed."""
    with av.open(str(file), metadata_errors="replace", options=_LIMITS) as container:
        if (num := len(container.streams)) > MAX_STREAMS:
            raise ValueError(f"{file}: {num} streams; expected at most {MAX_STREAMS}")
        stream = container.streams.video[0]
        context: Any = stream.codec_context  # None for an unknown codec, in spite of what PyAV's types say
        name = getattr(getattr(context, "codec", None), "canonical_name", None)
        if name not in CODECS:
            known = ", ".join(sorted(CODECS))
            raise ValueError(
                f"{file}: cannot be decoded: its codec is {name or 'not known'}; expected one of {known}; convert it or move it away"
            )
        if context.width * context.height > MAX_PIXELS:
            raise ValueError(f"{file}: frames of {context.width}x{context.height}; expected at most {MAX_PIXELS} pixels")
        context.thread_count = 2
        context.options = {"max_pixels": str(MAX_PIXELS)}  # a frame may be larger than the header says
        yield container, stream


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
        with av.open(str(file), metadata_errors="replace", options=_LIMITS) as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{file}: not a video that can be opened ({error}); repair it or move it away") from error
    if not rate:
        raise ValueError(f"{file}: says nothing about its frame rate; give frames_per_second")
    if not 0 < rate <= MAX_RATE:
        raise ValueError(f"{file}: says {float(rate):g} frames per second; expected at most {MAX_RATE:g}; give frames_per_second")
    return float(rate)
