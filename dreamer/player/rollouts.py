"""Open-loop dreams from chosen starts as a video or a picture, without a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dreamer.evaluation.media import VIDEO_SUFFIXES, encode_png, image_layout, upscale, write_atomic, write_video
from dreamer.imagination.policy import Mode
from dreamer.player.controls import Controls
from dreamer.player.engine import DreamSession, DreamSettings
from dreamer.player.source import DreamSource

Clip = UInt8[np.ndarray, "F H W 3"]

POLICIES: dict[str, Mode] = {"policy": "sampled", "policy-argmax": "argmax"}
COLUMNS = 9  # moments of a clip in a picture
GAP, PAPER, INK = 6, (255, 255, 255), (60, 60, 60)


@dataclass(frozen=True)
class Rollout:
    """A dream and, where it follows recorded actions, what was recorded. The first frame of both is the last that the model was shown."""

    label: str
    dream: Clip
    truth: Clip | None


def roll_out(source: DreamSource, place: tuple[int, int], actions: str, steps: int, settings: DreamSettings) -> Rollout:
    """Dream ``steps`` frames on from ``place`` (episode, latent step).

    actions: ``recorded``, ``noop``, ``policy``, ``policy-argmax``, or a script such as ``right*8,do*2``, which begins again at its end.
    Frames after the end that the model predicts repeat the last one. Raises ``ValueError`` for actions that are not there.
    """
    session = DreamSession(source, source.recorded(*place, settings.context), settings)
    session.mode = POLICIES.get(actions)
    rows = _rows(source, place, actions, steps)
    truth = None
    if actions == "recorded" and source.episodes is not None:
        first = source.latents.temporal_stride * place[1]
        truth = np.ascontiguousarray(image_layout(source.episodes.frames(place[0], first, first + steps + 1)))
    frames = [session.now.picture]
    for tick in range(steps + source.latents.temporal_stride):
        if len(frames) > steps or session.now.is_over:
            break
        before = session.now
        if session.tick(rows[min(tick, len(rows) - 1)]) is not before:
            frames.append(session.now.picture)
    frames += [frames[-1]] * (steps + 1 - len(frames))
    return Rollout(session.start.label, np.stack(frames), truth)


def _rows(source: DreamSource, place: tuple[int, int], actions: str, steps: int) -> Float[np.ndarray, "K A"]:
    """The actions of ``steps`` frames."""
    controls = Controls(source.agent.action_space)
    if actions in POLICIES:
        return controls.rest[None]
    if actions != "recorded":
        script = parse_script(controls, actions)
        return script[np.arange(steps) % len(script)]
    (episode, step), stride = place, source.latents.temporal_stride
    longest = num_recorded(source, place)
    if steps > longest:
        raise ValueError(
            f"--steps is {steps}; {longest} recorded actions follow episode {episode}, step {step}: start earlier, or give others"
        )
    arrays = source.latents.arrays(episode, step, step + -(-steps // stride))
    if not arrays["action_mask"].all():
        raise ValueError(f"episode {episode}: its actions are not known; give others than recorded, such as noop")
    rows = arrays["actions"].reshape(-1, controls.space.num_columns)
    return rows.repeat(stride // source.latents.actions_per_step, axis=0)


def num_recorded(source: DreamSource, place: tuple[int, int]) -> int:
    """Frames that were recorded after ``place``."""
    episode, step = place
    return source.latents.temporal_stride * (source.num_steps(episode) - 1 - step)


def parse_script(controls: Controls, script: str) -> Float[np.ndarray, "K A"]:
    """``right*8,forward+jump*2,noop`` as rows. Raises ``ValueError`` that names the part that is wrong."""
    rows = []
    for part in script.split(","):
        found = re.fullmatch(r"(.+?)(?:\*(\d{1,5}))?", part.strip())
        if found is None or found[2] == "0":
            raise ValueError(f"--actions: {part!r} in {script!r}; expected an action and how often, such as right*8")
        rows += [controls.named(found[1].strip())] * int(found[2] or 1)
    return np.stack(rows)


def choose_places(source: DreamSource, starts: Sequence[str], num: int, steps: int, settings: DreamSettings) -> list[tuple[int, int]]:
    """The places that ``starts`` (``episode:step``) name; without any, ``num`` of held-out episodes, early enough for ``steps`` more frames
    to have been recorded where that is possible."""
    if not starts:
        need = -(-steps // source.latents.temporal_stride)
        places = source.places(num, settings.seed, settings.context)
        return [(e, max(0, min(step, source.num_steps(e) - 1 - need))) for e, step in places]
    places = []
    for start in starts:
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", start)
        if found is None:
            raise ValueError(f"--start is {start!r}; expected episode:step, such as 3:20")
        places.append((int(found[1]), int(found[2])))
    return places


def write_rollouts(path: Path, rollouts: Sequence[Rollout], fps: float) -> Path:
    """A video (.mp4, .gif, .webp) or a picture (.png), by the suffix."""
    check_suffix(path)
    if path.suffix == ".png":
        return write_atomic(path, encode_png(as_picture(rollouts)))
    return write_video(path, as_video(rollouts), fps)


def check_suffix(path: Path) -> None:
    """Raises ``ValueError`` for a file that nothing can be written to."""
    if path.suffix not in (".png", *VIDEO_SUFFIXES):
        raise ValueError(f"{path}: suffix {path.suffix!r}; expected .png, {', '.join(VIDEO_SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file to write")


def as_video(rollouts: Sequence[Rollout]) -> Clip:
    """All rollouts at once, in about a square; beside each dream what was recorded."""
    clips = [(label, clip) for r in rollouts for label, clip in _clips(r)]
    each = len(_clips(rollouts[0]))
    across = each * math.ceil(math.sqrt(len(rollouts) / each))
    scale = _scale(rollouts)
    (num, height, width, _), font = clips[0][1].shape, _font()
    cell = (height * scale + GAP + 16, width * scale + GAP)
    size = (across * cell[1] + GAP, -(-len(clips) // across) * cell[0] + GAP)
    page = Image.new("RGB", size, PAPER)
    places = [(GAP + (i % across) * cell[1], GAP + (i // across) * cell[0]) for i in range(len(clips))]
    for (x, y), (label, _) in zip(places, clips, strict=True):
        ImageDraw.Draw(page).text((x, y), label, font=font, fill=INK)
    video = np.repeat(np.asarray(page)[None], num, axis=0)
    for (x, y), (_, clip) in zip(places, clips, strict=True):
        video[:, y + 16 : y + 16 + height * scale, x : x + width * scale] = upscale(clip, scale)
    return video


def as_picture(rollouts: Sequence[Rollout]) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each clip, moments from left to right."""
    clips = [(label, clip) for r in rollouts for label, clip in _clips(r)]
    scale, font = _scale(rollouts), _font()
    num, height, width, _ = clips[0][1].shape
    moments = np.unique(np.linspace(0, num - 1, min(COLUMNS, num)).round().astype(int))
    left = int(max(font.getlength(label) for label, _ in clips)) + 2 * GAP
    down, right = height * scale + GAP, width * scale + GAP
    page = Image.new("RGB", (left + len(moments) * right, 20 + len(clips) * down), PAPER)
    pen = ImageDraw.Draw(page)
    for i, t in enumerate(moments):
        pen.text((left + i * right + width * scale / 2, 4), f"+{t}", font=font, fill=INK, anchor="mt")
    for row, (label, clip) in enumerate(clips):
        pen.text((GAP, 20 + row * down + height * scale / 2), label, font=font, fill=INK, anchor="lm")
        for i, t in enumerate(moments):
            page.paste(Image.fromarray(upscale(clip[t], scale)), (left + i * right, 20 + row * down))
    return np.asarray(page)


def _clips(rollout: Rollout) -> list[tuple[str, Clip]]:
    if rollout.truth is None:
        return [(rollout.label, rollout.dream)]
    return [(rollout.label, rollout.truth), ("dream", rollout.dream)]


def _scale(rollouts: Sequence[Rollout]) -> int:
    return max(1, round(128 / min(rollouts[0].dream.shape[1:3])))


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(12)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
