"""Uploads are decoded with limits, and frames reach the page as they are."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dreamer.player import images
from dreamer.player.images import decode_upload, encode_frame, thumbnail
from dreamer.player.protocol import pack, unpack

SHAPE = (3, 8, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a very large picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def noise(height: int = 8, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_damage_of_every_kind_is_one_error() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    turned = encoded(Image.fromarray(noise()), "JPEG", exif=exif.tobytes())
    with pytest.raises(ValueError, match=r"image: cannot be decoded .*expected a whole PNG, JPEG, WEBP file"):
        decode_upload(turned.replace(b"\x01\x0e\x00\x02", b"\x01\x42\x00\x02", 1), SHAPE)  # a width that is a text: struct.error
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = np.frombuffer(encoded(Image.fromarray(noise()), kind), np.uint8)
        for _ in range(200):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 200), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert decode_upload(damaged.tobytes(), SHAPE).shape == (8, 16, 3)


def test_a_picture_of_the_right_size_arrives_unchanged() -> None:
    assert np.array_equal(decode_upload(encoded(Image.fromarray(noise())), SHAPE), noise())


def test_the_middle_is_taken_and_averaged() -> None:
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, 16:48:2] = 200  # the middle 32 columns alternate
    assert np.array_equal(decode_upload(encoded(Image.fromarray(wide)), SHAPE), np.full((8, 16, 3), 100, np.uint8))


def test_other_modes_become_rgb_and_pictures_stand_upright() -> None:
    assert decode_upload(encoded(Image.new("LA", (30, 30), (90, 10))), SHAPE).tolist()[0][0] == [90] * 3
    assert decode_upload(encoded(Image.new("P", (5, 5))), SHAPE).shape == (8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = Image.new("RGB", (16, 8))
    turned.paste((255, 255, 255), (0, 0, 16, 4))
    picture = decode_upload(encoded(turned, "JPEG", exif=exif.tobytes(), quality=100), SHAPE)
    assert picture[:4].mean() < 5 and picture[4:].mean() > 250


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "of no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of no known format"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "of no known format; expected one of PNG, JPEG, WEBP"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "of no known format"),
        (encoded(Image.fromarray(noise(64, 64)))[:-2000], "cannot be decoded"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-800], "cannot be decoded"),
        (huge_png(50_000, 50_000), "pixels"),
        (huge_png(4001, 4000), "4001 x 4000 pixels; expected at most 16000000"),
        (huge_png(2**31 - 1, 2**31 - 1), "pixels"),
        (huge_png(0, 5), "image: "),
        (bytes(images.MAX_UPLOAD + 1), "bytes; expected at most"),
    ],
    ids=["empty", "svg", "gif", "tiff", "cut png", "cut jpeg", "bomb", "just too large", "largest", "no width", "too many bytes"],
)
def test_bad_uploads_are_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        decode_upload(data, SHAPE)
    assert "\n" not in str(caught.value)


def test_small_frames_arrive_without_loss() -> None:
    sent = encode_frame(noise(64, 64))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent)).convert("RGB")), noise(64, 64))
    assert base64.b64decode(thumbnail(noise(64, 64)).partition(",")[2]) == sent


def test_large_frames_are_small_on_the_wire() -> None:
    smooth = np.tile(np.linspace(0, 255, 256, dtype=np.uint8)[:, None, None], (1, 256, 3))
    sent = encode_frame(smooth)
    assert len(sent) < 20_000
    assert np.abs(np.asarray(Image.open(io.BytesIO(sent)).convert("RGB")).astype(int) - smooth).mean() < 3


def test_frames_are_packed_and_unpacked() -> None:
    header, pictures = unpack(pack({"frame": 3, "reward": None}, [b"one", b"", b"three"]))
    assert header == {"frame": 3, "reward": None, "sizes": [3, 0, 5]} and pictures == [b"one", b"", b"three"]
    with pytest.raises(ValueError, match="JSON compliant"):
        pack({"reward": float("nan")}, [])
