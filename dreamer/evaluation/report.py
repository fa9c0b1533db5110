"""One HTML page that shows a run to people: self-contained, no scripts, nothing fetched.

Every part is optional, and the page says which is missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.charts import Chart, Line, line_chart, round_ticks, styled_lines
from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.media import data_uri, encode_png, encode_webp, image_layout, rgba, side_by_side, write_atomic
from dreamer.evaluation.strips import Clip
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS, WorldModelResult

PAGE_WIDTH = 924  # CSS pixels of the column, as in report.css: two panels of 64 pixels and their gap, seven times enlarged
Role = Literal["random", "recorded", "bc", "bc_long", "agent", "scripted"]
STYLES = {TRUE_ACTIONS: 0, SHUFFLED_ACTIONS: 1, COPY_LAST_FRAME: 2, RECONSTRUCTION: 3}
ROLE_STYLES: dict[str, int] = {"agent": 0, "bc": 1, "bc_long": 1}
BAR_RECORDED, BAR_DREAMED = (140, 140, 140, 255), (58, 124, 200, 255)


@dataclass(frozen=True)
class DreamClip:
    """A recording and what the model dreamed in its place. In all of them the first ``context`` frames are the recorded ones."""

    truth: Clip  # uint8 T C H W
    dreams: Mapping[str, Clip]  # by name, TRUE_ACTIONS first; each as long as ``truth``
    context: int
    fps: float
    caption: str = ""


@dataclass(frozen=True)
class AgentClip:
    """One episode of a player in the real environment."""

    label: str
    frames: UInt8[np.ndarray, "F H W C"]  # as ``evaluate_policy`` keeps them
    fps: float
    caption: str = ""


@dataclass(frozen=True)
class ReturnRow:
    """One row of the table of returns. ``role`` finds the rows that the key figures compare, with equal ``mode``."""

    label: str
    role: Role
    returns: Interval
    num_episodes: int
    mode: Literal["sampled", "argmax"] | None = None
    success: Interval | None = None  # share of episodes, 0..1

    @classmethod
    def of(cls, label: str, role: Role, result: AgentResult, mode: Literal["sampled", "argmax"] | None = None) -> ReturnRow:
        return cls(label, role, result.mean_return, len(result.returns), mode, result.success_rate)


@dataclass(frozen=True)
class Reconstructions:
    """Held-out frames beside what the tokenizer makes of them."""

    recorded: UInt8[Tensor, "n C H W"] | UInt8[np.ndarray, "n C H W"]
    decoded: UInt8[Tensor, "n C H W"] | UInt8[np.ndarray, "n C H W"]


@dataclass(frozen=True)
class KeyFigure:
    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class ReportData:
    """What a run has to show. A part that is left out is named as missing, never made up. Strings are plain text."""

    title: str
    summary: str = ""  # one or two sentences for strangers: what this is
    notice: str = ""  # a warning above everything, for example that a smoke run claims nothing about learning
    hero: DreamClip | None = None  # default: the first of ``dreams``
    dreams: Sequence[DreamClip] = ()
    world_model: WorldModelResult | None = None
    action_gap: Chart | None = None  # PSNR gap over training
    returns: Sequence[ReturnRow] = ()
    returns_note: str = ""  # what one unit of return is, how success is defined
    agent_clips: Sequence[AgentClip] = ()
    reconstructions: Reconstructions | None = None
    training_charts: Sequence[Chart] = ()
    key_figures: Sequence[KeyFigure] = ()  # after those that the page derives itself
    limits: Sequence[str] = ()  # paragraphs
    command: str = ""
    seed: int | None = None
    hardware: Mapping[str, str] = field(default_factory=dict)
    wall_seconds: Mapping[str, float] = field(default_factory=dict)  # by phase, in order
    config: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Render ``data`` to ``path``, whole or not at all."""
    return write_page(
        path,
        "report.html.j2",
        data=data,
        hero=_hero(data),
        cards=[*_world_model_cards(data), *_agent_cards(data), *_time_card(data), *data.key_figures],
        dreams=[_dream_figure(clip, list(clip.dreams), PAGE_WIDTH // 2) for clip in data.dreams],
        strip=_strip(data.dreams[0]) if data.dreams else None,
        horizon_charts=[chart_figure(chart) for chart in _horizon_charts(data.world_model)],
        action_gap=chart_figure(data.action_gap) if data.action_gap else None,
        returns=_returns_table(data.returns) if data.returns else None,
        agent_clips=[_agent_figure(clip) for clip in data.agent_clips],
        reconstructions=_reconstruction_pairs(data.reconstructions) if data.reconstructions else [],
        training_charts=[chart_figure(chart) for chart in data.training_charts],
        config_text=json.dumps(data.config, indent=2, default=str, ensure_ascii=False) if data.config else "",
        total_seconds=sum(data.wall_seconds.values()),
    )


def write_page(path: str | os.PathLike[str], template: str, **values: Any) -> Path:
    """Render a template of this folder to ``path``, whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": number, "interval": interval, "percent": percent}
    return write_atomic(path, environment.get_template(template).render(**values).encode())


# Words and numbers


def duration(seconds: float) -> str:
    """822.4 -> "13 min 42 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float) -> str:
    return f"{number(100 * value, 0)}\N{NARROW NO-BREAK SPACE}%"


def interval(figure: Interval, digits: int = 2, scale: float = 1.0) -> str:
    if figure.low is None or figure.high is None:
        return "no interval"
    return f"{number(scale * figure.low, digits)} to {number(scale * figure.high, digits)}"


def _world_model_cards(data: ReportData) -> list[KeyFigure]:
    if data.world_model is None:
        return []
    result = data.world_model
    names = {SHUFFLED_ACTIONS: "above the same dream with other recorded actions", COPY_LAST_FRAME: "above repeating the last frame"}
    note = f"{result.num_episodes} held-out episodes, {result.horizon} steps ahead"
    return [
        KeyFigure(
            f"{'+' if gap.value > 0 else ''}{number(gap.value, 1)} dB", f"PSNR {names[name]}", f"95 % interval {interval(gap, 1)}; {note}"
        )
        for name, gap in result.psnr_gaps.items()
        if name in names
    ]


def _agent_cards(data: ReportData) -> list[KeyFigure]:
    def find(role: Role, mode: str | None = None) -> ReturnRow | None:
        return next((row for row in data.returns if row.role == role and row.mode == mode), None)

    random, scripted = find("random"), find("scripted")
    cards = []
    for mode in ("sampled", "argmax"):
        agent = find("agent", mode)
        if agent is None:
            continue
        others = {"cloning": find("bc", mode), "cloning trained as long": find("bc_long", mode), "scripted player": scripted}
        note = "; ".join(f"{name} {number(row.returns.value)}" for name, row in others.items() if row)
        cards.append(KeyFigure(number(agent.returns.value), f"mean return after imagination, {mode} actions", note))
    best = find("agent", "sampled") or find("agent", "argmax")
    if best and random and scripted and scripted.returns.value > random.returns.value:
        share = (best.returns.value - random.returns.value) / (scripted.returns.value - random.returns.value)
        cards.append(KeyFigure(percent(share), "of the way from random to the scripted player", f"{best.mode} actions"))
    return cards


def _time_card(data: ReportData) -> list[KeyFigure]:
    if not data.wall_seconds:
        return []
    return [KeyFigure(duration(sum(data.wall_seconds.values())), "from first recording to last evaluation", data.hardware.get("CPU", ""))]


# Pictures


def _hero(data: ReportData) -> dict[str, Any] | None:
    clip = data.hero or (data.dreams[0] if data.dreams else None)
    return _dream_figure(clip, list(clip.dreams)[:1], PAGE_WIDTH) if clip else None


def _dream_figure(clip: DreamClip, names: Sequence[str], width: int) -> dict[str, Any]:
    """Panels side by side: the recording, then the named dreams, with a bar that turns blue where the dream begins."""
    panels = [_with_bar(image_layout(clip.truth), dreamed_from=len(clip.truth))]
    panels += [_with_bar(image_layout(clip.dreams[name]), dreamed_from=clip.context) for name in names]
    labels = ["Recorded", *(f"Dreamed, {name}" if len(names) == 1 else name.capitalize() for name in names)]
    what = f"Animation of {len(clip.truth)} frames: the recording; dreamed with {'; with '.join(names)}."
    alt = f"{what} The first {clip.context} frames are recorded in every panel."
    return _animation(panels, labels, clip.fps, width, alt) | {"caption": clip.caption, "context": clip.context}


def _agent_figure(clip: AgentClip) -> dict[str, Any]:
    alt = f"Animation: {clip.label} plays one episode of {len(clip.frames)} frames in the real environment."
    return _animation([clip.frames], [clip.label], clip.fps, PAGE_WIDTH // 3, alt) | {"caption": clip.caption}


def _animation(panels: Sequence[np.ndarray], labels: Sequence[str], fps: float, width: int, alt: str) -> dict[str, Any]:
    gap = max(2, panels[0].shape[2] // 16)
    frames = side_by_side(panels, gap)
    return {
        "moving": data_uri(encode_webp(frames, fps, hold=1.0), "image/webp"),
        **_picture(frames[-1], width),
        "labels": labels,
        "columns": f" {gap}fr ".join([f"minmax(0, {panels[0].shape[2]}fr)"] * len(panels)),
        "alt": alt,
    }


def _picture(image: np.ndarray, width: int) -> dict[str, Any]:
    """A still image, at most ``width`` CSS pixels wide: small ones enlarged by a whole factor, large ones shrunk."""
    height, own_width, _ = image.shape
    scale = width // own_width or width / own_width
    size = {"width": round(own_width * scale), "height": round(height * scale)}
    return {"still": data_uri(encode_png(image), "image/png"), **size, "crisp": scale >= 1}


def _with_bar(frames: np.ndarray, dreamed_from: int) -> np.ndarray:
    """Below the picture, after a gap: a bar as long as the time that has passed, coloured by where the frame comes from."""
    frames = rgba(frames)
    num_frames, height, width, _ = frames.shape
    thickness = max(1, height // 64)
    bar = np.zeros((num_frames, 2 * thickness, width, 4), np.uint8)
    for t in range(num_frames):
        bar[t, thickness:, : math.ceil(width * (t + 1) / num_frames)] = BAR_RECORDED if t < dreamed_from else BAR_DREAMED
    return np.concatenate([frames, bar], axis=1)


def _strip(clip: DreamClip, columns: int = 8) -> dict[str, Any]:
    """The first dream as still pictures, one row for the recording and one for each dream."""
    times = np.unique(np.linspace(clip.context, len(clip.truth) - 1, columns).round().astype(int))
    rows = {"Recorded": clip.truth, **{f"Dreamed, {name}": frames for name, frames in clip.dreams.items()}}
    pictures = []
    for label, frames in rows.items():
        row = side_by_side([f[None] for f in image_layout(frames)[times]], gap=max(1, np.shape(frames)[-1] // 32))[0]
        pictures.append({"label": label, **_picture(row, PAGE_WIDTH - 130)})
    return {"rows": pictures, "steps": [int(t) - clip.context + 1 for t in times]}


def _reconstruction_pairs(pairs: Reconstructions) -> list[dict[str, Any]]:
    recorded, decoded = image_layout(pairs.recorded), image_layout(pairs.decoded)
    if recorded.shape != decoded.shape:
        raise ValueError(f"reconstructions: {recorded.shape} recorded frames, {decoded.shape} decoded ones; expected the same (n, H, W, C)")
    gap = np.zeros((max(1, recorded.shape[1] // 32), recorded.shape[2], 4), np.uint8)
    width = PAGE_WIDTH // (7 if recorded.shape[2] <= PAGE_WIDTH // 7 else 4)
    return [_picture(np.concatenate([rgba(r), gap, rgba(d)]), width) for r, d in zip(recorded, decoded, strict=True)]


# Charts and the table of returns


def chart_figure(chart: Chart) -> dict[str, Any]:
    """What chart.html.j2 draws."""
    legend = [{"label": line.label, "style": style} for line, style in styled_lines(chart)]
    return {"title": chart.title, "caption": chart.caption, "legend": legend, "svg": line_chart(chart), "y_label": chart.y_label}


def _horizon_charts(result: WorldModelResult | None) -> list[Chart]:
    if result is None:
        return []

    def line(name: str, steps: Sequence[Interval]) -> Line:
        low = [s.value if s.low is None else s.low for s in steps]
        high = [s.value if s.high is None else s.high for s in steps]
        return Line(name, [float(i + 1) for i in range(len(steps))], [s.value for s in steps], low, high, STYLES.get(name))

    x_label = "frames after the last recorded one"
    return [
        Chart("PSNR by prediction distance", [line(n, s.psnr_per_step) for n, s in result.scores.items()], x_label, "dB"),
        Chart("SSIM by prediction distance", [line(n, s.ssim_per_step) for n, s in result.scores.items()], x_label),
    ]


def _returns_table(rows: Sequence[ReturnRow]) -> dict[str, Any]:
    """Rows with the places of their dot and interval, in percent of the axis that all rows share."""
    ends = [v for row in rows for v in (row.returns.low, row.returns.high, row.returns.value) if v is not None]
    low, high = min(0.0, *ends), max(ends)
    high = high if high > low else low + 1

    def place(value: float | None) -> float | None:
        return None if value is None else round(2 + 94 * (value - low) / (high - low), 2)

    ticks = [tick for tick in round_ticks(low, high, 4) if low <= tick <= high]
    counts = {row.num_episodes for row in rows}
    return {
        "rows": [
            {
                "row": row,
                "style": ROLE_STYLES.get(row.role, 2),
                "at": place(row.returns.value),
                "low": place(row.returns.low),
                "high": place(row.returns.high),
            }
            for row in rows
        ],
        "ticks": [{"at": place(t), "text": f"{t:g}"} for t in ticks],
        "same_count": counts.pop() if len(counts) == 1 else None,
        "has_success": any(row.success for row in rows),
    }
