"""Pictures and videos as files: PNG, GIF and WebP through Pillow, mp4 through PyAV.

Here frames are laid out as image files have them, uint8 ``F H W C``; ``image_layout`` converts from the ``F C H W`` of everywhere else.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dreamer.data.files import atomic_file

MAX_GIF_FPS = 50  # browsers slow down anything faster
VIDEO_SUFFIXES = (".mp4", ".gif", ".webp")


def image_layout(frames: UInt8[Tensor, "*f C H W"] | UInt8[np.ndarray, "*f C H W"]) -> UInt8[np.ndarray, "*f H W C"]:
    """Frames as the models have them (channels first) to frames as image files have them (channels last)."""
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim < 3 or array.shape[-3] not in (1, 3, 4):
        raise ValueError(f"image_layout: got {array.dtype} {array.shape}; expected uint8 (..., C, H, W) with 1, 3 or 4 channels")
    return np.moveaxis(array, -3, -1)


def upscale(frames: UInt8[np.ndarray, "*f H W C"], scale: int) -> UInt8[np.ndarray, "*f H2 W2 C"]:
    """Every pixel becomes ``scale`` by ``scale`` pixels: small frames stay crisp where a viewer would blur them."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def fitting_scale(height: int, width: int, short_side: int = 256) -> int:
    """The smallest whole factor that brings the shorter side to ``short_side`` pixels; 1 for larger frames."""
    return max(1, -(-short_side // min(height, width)))


def side_by_side(panels: Sequence[UInt8[np.ndarray, "F H W C"]], gap: int = 4) -> UInt8[np.ndarray, "F H W2 C2"]:
    """Panels of equal size in one row, with a transparent gap between them (so the result is RGBA): one file keeps them in step."""
    for panel in panels:
        check_frames(panel, "side_by_side")
        if panel.shape[:3] != panels[0].shape[:3]:
            raise ValueError(f"side_by_side: panels of {panels[0].shape[:3]} and {panel.shape[:3]} (F, H, W); expected the same size")
    frames, height, width, _ = panels[0].shape
    canvas = np.zeros((frames, height, len(panels) * (width + gap) - gap, 4), np.uint8)
    for i, panel in enumerate(panels):
        canvas[:, :, i * (width + gap) : i * (width + gap) + width] = rgba(panel)
    return canvas


def rgba(frames: UInt8[np.ndarray, "*f H W C"]) -> UInt8[np.ndarray, "*f H W 4"]:
    """The same frames with four channels; opaque unless they had an alpha channel already."""
    if frames.shape[-1] == 4:
        return frames
    colour = np.broadcast_to(frames, (*frames.shape[:-1], 3))
    return np.concatenate([colour, np.full((*frames.shape[:-1], 1), 255, np.uint8)], axis=-1)


def encode_png(image: UInt8[np.ndarray, "H W C"]) -> bytes:
    check_frames(image[None], "encode_png")
    return _save(_pillow(image), "PNG", optimize=True)


def encode_gif(frames: UInt8[np.ndarray, "F H W C"], fps: float, *, hold: float = 0.0) -> bytes:
    """An endless GIF, for READMEs. Each frame has its own 256 colours, undithered. ``hold``: seconds that the last frame stays longer."""
    check_frames(frames, "encode_gif")
    if fps > MAX_GIF_FPS:
        raise ValueError(f"encode_gif: {fps:g} frames/s; a GIF holds at most {MAX_GIF_FPS}. Write .webp or .mp4, or skip frames")
    images = [_pillow(f).convert("RGB").quantize(256, dither=Image.Dither.NONE) for f in frames]
    return _save(images[0], "GIF", save_all=True, append_images=images[1:], duration=_durations(len(frames), fps, hold, unit=10), loop=0)


def encode_webp(frames: UInt8[np.ndarray, "F H W C"], fps: float, *, hold: float = 0.0) -> bytes:
    """An endless lossless WebP: all colours, smaller than a GIF, with transparency, shown by every browser."""
    check_frames(frames, "encode_webp")
    images = [_pillow(f) for f in frames]
    durations = _durations(len(frames), fps, hold, unit=1)
    return _save(images[0], "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True, method=4)


def encode_mp4(frames: UInt8[np.ndarray, "F H W C"], fps: float) -> bytes:
    """H.264 that every player opens (yuv420p). Small frames are enlarged by a whole factor first, else their colours smear."""
    check_frames(frames, "encode_mp4")
    frames = upscale(rgba(frames)[..., :3], fitting_scale(*frames.shape[1:3]))
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, odd, mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "16", "mbtree": "0"}  # x264's mbtree reads memory that nothing has written: equal frames gave unequal files
        stream = container.add_stream("libx264", rate=Fraction(_check_fps(fps)).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def write_video(path: str | os.PathLike[str], frames: UInt8[np.ndarray, "F H W C"], fps: float) -> Path:
    """Write ``frames`` as the suffix says: .mp4, .gif or .webp. Whole or not at all."""
    path = Path(path)
    encoders = dict(zip(VIDEO_SUFFIXES, (encode_mp4, encode_gif, encode_webp), strict=True))
    if path.suffix not in encoders:
        raise ValueError(f"{path}: suffix {path.suffix!r} is no video; expected one of {', '.join(VIDEO_SUFFIXES)}")
    return write_atomic(path, encoders[path.suffix](frames, fps))


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write beside, fsync, rename: after a crash the old file or the new one is there, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as beside:
        beside.write_bytes(data)
    return path


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as an address that a page can hold in itself."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def check_frames(frames: np.ndarray, where: str) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3, 4):
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"{where}: got {got}; expected uint8 frames (F, H, W, C) with 1, 3 or 4 channels")
    if frames.size == 0:
        raise ValueError(f"{where}: frames {frames.shape} are empty; expected at least one pixel")


def _check_fps(fps: float) -> float:
    if not 0 < fps < 1000:
        raise ValueError(f"fps is {fps}; expected above 0 and below 1000 frames per second")
    return fps


def _durations(num_frames: int, fps: float, hold: float, unit: int) -> list[int]:
    """Milliseconds of each frame in whole ``unit``s, rounded so that the sum, not each frame, keeps the frame rate."""
    ends = np.round(np.arange(num_frames + 1) * 1000 / _check_fps(fps) / unit).astype(int) * unit
    durations = np.diff(ends)
    durations[-1] += round(hold * 1000)
    return durations.tolist()


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
