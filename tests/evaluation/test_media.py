import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import av
import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dreamer.evaluation import media


def clip(num_frames=6, height=16, width=24, channels=3):
    """Smooth colours, different in every frame, so that codecs cannot merge frames."""
    t, y, x, c = np.meshgrid(*map(np.arange, (num_frames, height, width, channels)), indexing="ij")
    return ((40 * t + 3 * y + 5 * x + 60 * c) % 256).astype(np.uint8)


def test_mp4_keeps_frames_count_rate_and_colours(tmp_path):
    frames = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], np.uint8), 15 * 20, axis=0).reshape(4, 15, 20, 3)
    path = media.write_video(tmp_path / "a.mp4", frames, fps=10.0)
    with av.open(path) as container:
        stream = container.streams.video[0]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate == 10
    assert decoded.shape == (4, 270, 360, 3)  # 15 x 20 enlarged 18 times
    assert np.abs(decoded.mean((1, 2)) - frames.mean((1, 2))).max() < 8


def test_mp4_of_equal_frames_is_equal_whatever_the_memory_held_before(tmp_path):
    code = (
        "import hashlib, numpy as np; from dreamer.evaluation.media import encode_mp4; "
        "frames = np.random.default_rng(0).integers(0, 256, (5, 70, 212, 3), dtype=np.uint8); "
        "print(hashlib.sha256(encode_mp4(frames, 10.0)).hexdigest())"
    )
    told = set()
    for fill in ("1", "255"):  # glibc fills new memory with it
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        told.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(told) == 1


def test_mp4_pads_odd_sizes_by_one_pixel(tmp_path):
    path = media.write_video(tmp_path / "a.mp4", clip(2, 301, 257), fps=5.0)
    with av.open(path) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (302, 258)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_is_lossless_endless_and_holds_the_last_frame(channels):
    frames = clip(4, channels=channels)
    if channels == 4:
        frames[..., 3] = 255
    with Image.open(io.BytesIO(media.encode_webp(frames, 8.0, hold=1.0))) as image:
        shown = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
    assert [duration for _, duration in shown] == [125, 125, 125, 1125]
    for (pixels, _), frame in zip(shown, frames, strict=True):
        assert np.array_equal(pixels, np.broadcast_to(frame[..., :3], (16, 24, 3)))


def test_gif_keeps_its_rate_on_average_and_few_colours_exactly():
    frames = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 16 * 16 * 3).reshape(12, 16, 16, 3)
    with Image.open(io.BytesIO(media.encode_gif(frames, 30.0))) as image:
        shown = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    assert sum(duration for _, duration in shown) == 400  # 12 frames at 30/s, although a GIF counts in 10 ms
    assert all(np.array_equal(pixels, frame) for (pixels, _), frame in zip(shown, frames, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: media.encode_gif(clip(), 60.0), "at most 50"),
        (lambda: media.encode_mp4(clip(), 0.0), "fps is 0"),
        (lambda: media.encode_mp4(clip()[:0], 5.0), "empty"),
        (lambda: media.write_video("a.avi", clip(), 5.0), r"\.avi.*\.mp4"),
        (lambda: media.side_by_side([clip(2), clip(3)]), "same size"),
        (lambda: media.image_layout(clip(channels=3)), "C, H, W"),
        (lambda: media.image_layout(torch.zeros(3, 4, 4)), "uint8"),
    ],
)
def test_bad_input_is_named(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks answer
    with pytest.raises(ValueError, match=message):
        call()


def test_channels_move_last_for_tensors_and_arrays():
    frames = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    for source in (frames, frames.numpy()):
        assert np.array_equal(media.image_layout(source), frames.permute(0, 2, 3, 1).numpy())


def test_side_by_side_puts_a_transparent_gap_between_panels():
    left, right = clip(2), 255 - clip(2)
    both = media.side_by_side([left, right], gap=3)
    assert both.shape == (2, 16, 51, 4)
    assert np.array_equal(both[:, :, :24, :3], left) and np.array_equal(both[:, :, 27:, :3], right)
    assert (both[:, :, 24:27, 3] == 0).all() and (both[:, :, :24, 3] == 255).all()


def test_upscaling_repeats_pixels():
    frames = clip(1, 2, 2)
    large = media.upscale(frames, 3)
    assert large.shape == (1, 6, 6, 3) and np.array_equal(large[:, ::3, ::3], frames) and np.array_equal(large[:, 2::3, 2::3], frames)


@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 4), (64, 80, 4), (60, 60, 5), (256, 300, 1), (720, 1280, 1)])
def test_fitting_scale_reaches_256_pixels(height, width, scale):
    assert media.fitting_scale(height, width) == scale


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside(tmp_path, monkeypatch):
    path = media.write_atomic(tmp_path / "new" / "a.bin", b"old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        media.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_png_and_data_uri_round_trip():
    image = clip(1)[0]
    uri = media.data_uri(media.encode_png(image), "image/png")
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), image)
