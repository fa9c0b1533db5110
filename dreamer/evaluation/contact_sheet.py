"""Frames of some episodes on one picture, each with the action that was taken there drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from dreamer.evaluation.media import image_layout, rgba, upscale
from dreamer.ops.minecraft import CAMERA, decode_camera
from dreamer.types import ActionSpace

HEIGHT = 192  # about that of a frame on the sheet
GAP = 6
LINES = 3  # of words on a frame
INK, SHADE, MARK = (255, 255, 255), (0, 0, 0), (255, 208, 64)


@dataclass(frozen=True)
class SheetRow:
    """Some frames of one episode. ``steps`` are their numbers."""

    title: str
    steps: list[int]
    frames: UInt8[np.ndarray, "K C H W"]
    actions: Float[np.ndarray, "K A"]
    mask: Bool[np.ndarray, " K"]


def action_words(space: ActionSpace, row: Shaped[np.ndarray, " A"]) -> list[str]:
    """An action in words: the keys that are held, the chosen categories, the numbers. ``none`` and ``still`` say nothing."""
    words: list[str] = []
    for component, columns in space.slices():
        values = row[columns].tolist()
        labels = component.labels or tuple(f"{component.name}{i if component.size > 1 else ''}" for i in range(component.size))
        if component.kind == "binary":
            words += [label for label, value in zip(labels, values, strict=True) if value]
        elif component.kind == "continuous":
            words.append(f"{component.name} {' '.join(f'{value:.2g}' for value in values)}")
        else:
            label = component.labels[int(values[0])] if component.labels else str(int(values[0]))
            is_plain = bool(component.labels) and (component == CAMERA or len(space.components) == 1)
            if label not in ("none", "still"):
                words.append(label if is_plain else f"{component.name} {label}")
    return words


def contact_sheet(rows: Sequence[SheetRow], space: ActionSpace) -> UInt8[np.ndarray, "H2 W2 3"]:
    """One line of frames for each row. Raises ``ValueError`` without any frame."""
    if not any(row.steps for row in rows):
        raise ValueError("contact_sheet: got no frames; expected at least one")
    cells = [[_cell(row, i, space) for i in range(len(row.steps))] for row in rows]
    width = max(sum(cell.width + GAP for cell in line) for line in cells) + GAP
    title = 24
    heights = [max((cell.height for cell in line), default=0) + title + GAP for line in cells]
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), GAP
    for row, line, height in zip(rows, cells, heights, strict=True):
        draw.text((GAP, top + title / 2), row.title, font=font, fill=(60, 60, 60), anchor="lm")
        left = GAP
        for cell in line:
            sheet.paste(cell, (left, top + title))
            left += cell.width + GAP
        top += height
    return np.asarray(sheet)


def _cell(row: SheetRow, index: int, space: ActionSpace) -> Image.Image:
    """A frame with its number, the words of its action, and an arrow for the camera."""
    frame = rgba(image_layout(row.frames[index]))[..., :3]
    height, width = frame.shape[:2]
    if height > 2 * HEIGHT:
        image = Image.fromarray(frame).resize((max(1, width * HEIGHT // height), HEIGHT), Image.Resampling.BOX)
    else:
        image = Image.fromarray(upscale(frame, max(1, HEIGHT // height)))
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(12)
    if row.mask[index]:
        _draw_turn(draw, image.size, space, row.actions[index])
        lines = _wrap(action_words(space, row.actions[index]), draw, font, image.width - 6)
    else:
        lines = ["?"]
    _write(draw, (0, 0), [str(row.steps[index])], font)
    _write(draw, (0, image.height - 14 * len(lines)), lines, font)
    return image


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    """Light words on a dark ground that lets the frame shine through."""
    for i, text in enumerate(lines):
        x, y = at[0], at[1] + 14 * i
        draw.rectangle((x, y, x + draw.textlength(text, font=font) + 5, y + 13), fill=(*SHADE, 150))
        draw.text((x + 3, y + 7), text, font=font, fill=INK, anchor="lm")


def _wrap(words: Sequence[str], draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are no wider than ``width``, as far as single words allow; what does not fit into ``LINES`` of them becomes dots."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]}, {word}" if lines else word
        if lines and draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} ..."]


def _draw_turn(draw: ImageDraw.ImageDraw, size: tuple[int, int], space: ActionSpace, row: Shaped[np.ndarray, " A"]) -> None:
    """An arrow from the middle to where Minecraft's camera turns, the longer the faster."""
    for component, columns in space.slices():
        if component == CAMERA:
            pitch, yaw = (decode_camera(row[columns].astype(np.int64))[0] / 10 * min(size) * 0.45).tolist()
            x, y = size[0] / 2, size[1] / 2
            if pitch or yaw:
                draw.line((x, y, x + yaw, y + pitch), fill=MARK, width=3)
                draw.ellipse((x + yaw - 4, y + pitch - 4, x + yaw + 4, y + pitch + 4), fill=MARK)
