"""Line charts as inline SVG. Colours come from the page's CSS (classes ``s0`` .. ``s4``), so one chart serves light and dark."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 270  # user units; narrow, so that text stays readable when a phone shows the chart at 350 pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 40
NUM_STYLES = 5
MAX_POINTS = 120


@dataclass(frozen=True)
class Line:
    """One curve. ``low`` and ``high`` draw a band around it; ``style`` picks colour and dashes (blue, orange, grey, green, plum)."""

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    low: Sequence[float | int] | None = None
    high: Sequence[float | int] | None = None
    style: int | None = None  # None: by its place in the chart


@dataclass(frozen=True)
class Chart:
    title: str
    lines: Sequence[Line]
    x_label: str = "training step"
    y_label: str = ""
    log_y: bool = False
    caption: str = ""


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """``metrics.jsonl`` of a run as ``{key: (steps, values)}``."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = {str(key): float(value) for key, value in json.loads(line).items()}
            step = row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a metrics row ({error!r}); expected a JSON object of numbers with 'step'") from error
        for key, value in row.items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(step)
            values.append(value)
    return curves


def metrics_chart(title: str, path: Path, keys: Mapping[str, str], **options: object) -> Chart:
    """A chart of some keys of ``metrics.jsonl``: ``keys`` maps each to its label. Long curves are cut into 120 stretches: the line is the
    mean of each, the band goes from its smallest to its largest value. Options are ``Chart``'s."""
    curves = read_metrics(path)
    missing = [key for key in keys if key not in curves]
    if missing:
        raise ValueError(f"{path}: no values for {missing}; the file has {sorted(curves)}")
    return Chart(title, [_thinned(label, *curves[key]) for key, label in keys.items()], **options)  # pyright: ignore[reportArgumentType]


def _thinned(label: str, x: Sequence[float], y: Sequence[float]) -> Line:
    if len(x) <= MAX_POINTS:
        return Line(label, x, y)
    parts = np.array_split(np.array([x, y], dtype=np.float64), MAX_POINTS, axis=1)
    columns = [[p[0, -1], p[1].mean(), p[1].min(), p[1].max()] for p in parts]
    last_x, mean_y, low, high = np.array(columns).T.tolist()
    return Line(label, last_x, mean_y, low, high)


def line_chart(chart: Chart) -> Markup:
    """The chart as ``<svg>``, with a text alternative that says where each line starts and ends."""
    styled = [(_as_floats(line), style) for line, style in styled_lines(chart)]
    lines = [line for line, _ in styled]
    _check(chart, lines)
    xs = [v for line in lines for v in line.x]
    ys = [v for line in lines for values in (line.y, line.low, line.high) for v in values or ()]
    x_ticks = round_ticks(min(xs), max(xs), 6, steps=(1.0, 2.0, 5.0, 10.0))
    y_ticks = _log_ticks(min(ys), max(ys)) if chart.log_y else round_ticks(min(ys), max(ys), 5)
    x_range = (min(xs), max(max(xs), min(xs) + 1e-9))
    y_range = (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def px(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        low, high, y = (math.log10(v) for v in (*y_range, y)) if chart.log_y else (*y_range, y)
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_described(chart, lines))}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    for x in (x for x in x_ticks if x_range[0] <= x <= x_range[1]):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x_label)}</text>')
    for line, style in reversed(styled):  # the first line on top
        parts.append(_drawn(line, style, px, py))
    return Markup("".join([*parts, "</svg>"]))


def _as_floats(line: Line) -> Line:
    given = {name: getattr(line, name) for name in ("x", "y", "low", "high")}
    return dataclasses.replace(line, **{name: [float(v) for v in values] for name, values in given.items() if values is not None})


def styled_lines(chart: Chart) -> list[tuple[Line, int]]:
    """The lines that have points, each with the number of its style."""
    return [(line, (i if line.style is None else line.style) % NUM_STYLES) for i, line in enumerate(chart.lines) if len(line.x)]


def _drawn(line: Line, style: int, px: object, py: object) -> str:
    assert callable(px) and callable(py)
    points = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.y, strict=True)]
    band = ""
    if line.low is not None and line.high is not None:
        edge = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
        band = f'<polygon class="band s{style}" points="{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in edge)}"/>'
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'{band}<circle class="dot s{style}" cx="{x}" cy="{y}" r="3"/>'
    return f'{band}<polyline class="line s{style}" points="{" ".join(points)}"/>'


def _check(chart: Chart, lines: Sequence[Line]) -> None:
    if not lines:
        raise ValueError(f"chart {chart.title!r}: no line has a point; expected at least one")
    for line in lines:
        for name in ("x", "y", "low", "high"):
            values = getattr(line, name)
            if values is None:
                continue
            if len(values) != len(line.x):
                raise ValueError(f"chart {chart.title!r}, line {line.label!r}: {len(values)} values in {name}, {len(line.x)} in x")
            if not all(math.isfinite(v) for v in values):
                raise ValueError(f"chart {chart.title!r}, line {line.label!r}: {name} holds NaN or infinity")
            if chart.log_y and name != "x" and min(values) <= 0:
                raise ValueError(
                    f"chart {chart.title!r}, line {line.label!r}: {name} holds {min(values):g}; a log axis needs values above 0"
                )


def _described(chart: Chart, lines: Sequence[Line]) -> str:
    ends = [f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines]
    return f"{chart.title}. {chart.y_label or 'Value'} over {chart.x_label}: {'; '.join(ends)}."


def round_ticks(low: float, high: float, wanted: int, steps: Sequence[float] = (1.0, 2.0, 2.5, 5.0, 10.0)) -> list[float]:
    """About ``wanted`` round numbers that enclose [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in steps if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high]; with 2 and 5 between them where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high * 1.0001))
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in ((1,) if last - first > 3 else (1, 2, 5))]
    start = max([i for i, t in enumerate(ticks) if t <= low * 1.0001], default=0)
    stop = min([i for i, t in enumerate(ticks) if t >= high * 0.9999], default=len(ticks) - 1)
    return ticks[start : max(stop, start + 1) + 1]


def _short(value: float) -> str:
    """1500 -> 1.5k, 0.5 -> 0.5, 30000 -> 30k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1000:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"
