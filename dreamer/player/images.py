"""Pictures in and out of the browser: uploads decoded with limits, frames encoded for the wire."""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreamer.player.source import Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_UPLOAD = 4 << 20  # bytes
MAX_PIXELS = 16_000_000  # of an upload, looked at before it is decoded
SMALL = 128 * 128  # pixels; frames up to this size are sent without loss, and are no larger for it


class _TooLarge(ValueError):
    pass


def decode_upload(data: bytes, frame_shape: tuple[int, int, int]) -> Picture:
    """A picture of the model's size from what somebody sent: its middle, as large as it fits.

    Raises ``ValueError`` for more bytes or pixels than allowed, other formats than ``FORMATS``, and damage.
    """
    if len(data) > MAX_UPLOAD:
        raise ValueError(f"image: {len(data)} bytes; expected at most {MAX_UPLOAD}")
    _, height, width = frame_shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _TooLarge(f"image: {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}: save it smaller")
                upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"image: of no known format; expected one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"image: more pixels than the allowed {MAX_PIXELS}") from None
    except _TooLarge:
        raise
    except Exception as error:  # Pillow has no list of what it raises for damage: OSError, SyntaxError, struct.error and others were seen
        raise ValueError(f"image: cannot be decoded ({error}); expected a whole {', '.join(FORMATS)} file") from error
    return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BOX))


def encode_frame(picture: Picture) -> bytes:
    """WebP, without loss where frames are small and every pixel is seen."""
    buffer = io.BytesIO()
    is_small = picture.shape[0] * picture.shape[1] <= SMALL
    Image.fromarray(picture).save(buffer, "WEBP", lossless=is_small, quality=0 if is_small else 88, method=0)
    return buffer.getvalue()


def thumbnail(picture: Picture) -> str:
    """The picture as an address that a page can show."""
    return "data:image/webp;base64," + base64.b64encode(encode_frame(picture)).decode("ascii")
