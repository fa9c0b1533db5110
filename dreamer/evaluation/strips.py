"""Dreams beside the truth as one labelled picture or video that explains itself outside the report (README, TensorBoard)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dreamer.evaluation.media import image_layout, rgba, upscale

Clip = UInt8[Tensor, "T C H W"] | UInt8[np.ndarray, "T C H W"]
INK = (82, 82, 82)
TRUTH = "recorded"


def dream_strip(
    truth: Clip, dreams: Mapping[str, Clip], *, columns: int = 8, scale: int | None = None, first_step: int = 1
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Rows: the recording, then each dream. Columns: ``columns`` time steps spread evenly over the clip, the last one included.

    ``first_step`` is the number written over the clip's first frame.
    """
    rows = _rows(truth, dreams)
    num_frames, height, width, _ = next(iter(rows.values())).shape
    scale = scale or max(1, round(96 / height))
    steps = np.unique(np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int))
    cell_h, cell_w, gap = height * scale, width * scale, 4
    font, left, top = _margins(rows, cell_h)
    size = (left + len(steps) * (cell_w + gap), top + len(rows) * (cell_h + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, step in enumerate(steps):
        x = left + column * (cell_w + gap)
        draw.text((x + cell_w / 2, top - gap), f"{first_step + step:+d}", font=font, fill=INK, anchor="ms")
        for row, frames in enumerate(rows.values()):
            canvas.paste(Image.fromarray(upscale(frames[step, ..., :3], scale)), (x, top + row * (cell_h + gap)))
    for row, name in enumerate(rows):
        draw.text((left - 2 * gap, top + row * (cell_h + gap) + cell_h / 2), name, font=font, fill=INK, anchor="rm")
    return np.asarray(canvas)


def dream_video(truth: Clip, dreams: Mapping[str, Clip], *, context: int = 0, scale: int | None = None) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """The recording and each dream side by side, labelled. Frames before ``context`` are recorded in every panel, and a grey bar below
    the panels says so; the bar turns blue where the dream begins."""
    rows = _rows(truth, dreams)
    num_frames, height, width, _ = next(iter(rows.values())).shape
    scale = scale or max(1, round(256 / height))
    panel_w, panel_h, gap = width * scale, height * scale, 8
    font_size = max(11, panel_h // 16)
    font, top = ImageFont.load_default(font_size), 2 * font_size
    frames = []
    for t in range(num_frames):
        canvas = Image.new("RGB", (len(rows) * (panel_w + gap) + gap, top + panel_h + 2 * gap), "white")
        draw = ImageDraw.Draw(canvas)
        for i, (name, panel) in enumerate(rows.items()):
            x = gap + i * (panel_w + gap)
            draw.text((x, top - gap / 2), name, font=font, fill=INK, anchor="ls")
            canvas.paste(Image.fromarray(upscale(panel[t, ..., :3], scale)), (x, top))
            bar = (x, top + panel_h + 3, x + round(panel_w * (t + 1) / num_frames), top + panel_h + 5)
            draw.rectangle(bar, fill=INK if t < context or i == 0 else (37, 99, 173))
        frames.append(np.asarray(canvas))
    return np.stack(frames)


def _rows(truth: Clip, dreams: Mapping[str, Clip]) -> dict[str, np.ndarray]:
    rows = {name: rgba(image_layout(clip)) for name, clip in {TRUTH: truth, **dreams}.items()}
    for name, clip in rows.items():
        if clip.shape != rows[TRUTH].shape or clip.ndim != 4:
            raise ValueError(f"{name}: clip is {clip.shape[:-1]} (T, H, W), the recording {rows[TRUTH].shape[:-1]}; expected the same")
    return rows


def _margins(rows: Mapping[str, object], cell_height: int) -> tuple[ImageFont.FreeTypeFont, int, int]:
    """Font, width of the label margin, height of the step margin, in pixels."""
    font = ImageFont.load_default(max(10, min(18, cell_height // 6)))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font, int(max(font.getlength(name) for name in rows)) + 20, round(font.size * 2)
