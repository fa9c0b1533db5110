"""``dreamer runs``: the runs below some folders, side by side: how far each is, what it reached, which settings differ; their curves on
one page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.config import DreamerConfig
from dreamer.evaluation.charts import NUM_STYLES, Chart, Line, read_metrics
from dreamer.evaluation.report import chart_figure, duration, write_page
from dreamer.evaluation.video import SHUFFLED_ACTIONS
from dreamer.pipeline.report import CHARTS, agent_rows, world_model_result
from dreamer.pipeline.run import Run
from dreamer.training.checkpoint import list_checkpoints, planned_steps
from dreamer.yaml_config import load_config

PHASES = ("tokenizer", "phase1", "phase2", "phase3", "bc_long")
PER_RUN = ("seed", "run_dir", "device", "threads", "data.num_workers")  # settings that make no other kind of run
LONGEST = 40  # characters of a value in the terminal; the page shows all
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Entry:
    """One run, as its folder tells. ``problem``: why no more of it can be told; the rest is empty then."""

    path: Path
    settings: dict[str, Any]  # dotted key: value
    columns: dict[str, str]  # of the table
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    entries: list[Entry]

    @property
    def titles(self) -> list[str]:
        fullest = sorted(self.entries, key=lambda entry: -len(entry.columns))  # its order is that of all
        return list(dict.fromkeys(title for entry in fullest for title in entry.columns))

    @property
    def differences(self) -> dict[str, list[str]]:
        """Settings that are not the same in all runs that can be read: the value of each of these, as JSON."""
        read = [entry.settings for entry in self.entries if not entry.problem]
        keys = dict.fromkeys(key for settings in read for key in settings)
        values = {key: [json.dumps(settings[key]) if key in settings else "" for settings in read] for key in keys}
        words = ("run_dir", "report.")  # where it is, and what its page says
        return {key: shown for key, shown in values.items() if len(set(shown)) > 1 and not key.startswith(words)}

    def text(self) -> str:
        rows = [["run", *self.titles], *([str(e.path), *(e.columns.get(title, "") for title in self.titles)] for e in self.entries)]
        lines = [*_aligned(rows), *(f"{entry.path}: {entry.problem}" for entry in self.entries if entry.problem)]
        if self.differences:
            names = [str(entry.path) for entry in self.entries if not entry.problem]
            short = {key: [_short(value) for value in values] for key, values in self.differences.items()}
            lines += ["", *_aligned([["setting", *names], *([key, *values] for key, values in short.items())])]
        return "\n".join(lines)


def compare(folders: Sequence[Path]) -> Comparison:
    """All runs in and below ``folders``, sorted by path. A damaged one is listed with its problem. ``ValueError`` if there is none."""
    paths = sorted({path for folder in folders for path in _find(folder)})
    if not paths:
        raise ValueError(f"{', '.join(map(str, folders))}: no runs here; a run is a folder with config.yaml that a stage has worked in")
    return Comparison([_entry(path) for path in paths])


def write_comparison(comparison: Comparison, out: Path, command: str) -> Path:
    """The page. Runs that differ in their seed alone are one curve: their mean, in a band from the smallest to the largest.

    Raises ``ValueError`` for more kinds of runs than curves can be told apart, and for metrics that are damaged.
    """
    kinds: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        if not entry.problem:
            kind = {key: value for key, value in entry.settings.items() if key not in PER_RUN}
            kinds.setdefault(json.dumps(kind, sort_keys=True), []).append(entry)
    if len(kinds) > NUM_STYLES:
        raise ValueError(f"{len(kinds)} kinds of runs (seeds aside); expected at most {NUM_STYLES} on one page: name fewer folders")
    groups = {_label(entries): [_metrics(entry.path) for entry in entries] for entries in kinds.values()}
    figures = [chart_figure(chart) for chart in _charts(groups)]
    read = [str(entry.path) for entry in comparison.entries if not entry.problem]
    return write_page(out, "runs.html.j2", comparison=comparison, read=read, charts=figures, command=command)


def _find(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    for place, folders, files in os.walk(folder):
        if "config.yaml" in files and ({*PHASES, "episodes", "evaluation"} & {*folders}):
            yield Path(place)
            folders.clear()  # a run holds no other runs


def _entry(path: Path) -> Entry:
    try:
        config = load_config(DreamerConfig, path / "config.yaml")
        run = Run(config.model_copy(update={"run_dir": path, "device": "cpu", "threads": None}))  # only read: on any machine
        return Entry(path, _flat(config.model_dump(mode="json")), {"seed": str(config.seed), **_reached(run)})
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Entry(path, {}, {}, " ".join(str(error).split()))


def _reached(run: Run) -> dict[str, str]:
    found = {}
    for phase in PHASES:
        if checkpoints := list_checkpoints(run.path / phase):
            step, checkpoint = checkpoints[-1]
            planned = run.config.tokenizer_steps if phase == "tokenizer" else planned_steps(checkpoint, phase)
            found[phase] = str(step) if step >= planned else f"{step} of {planned}"
        elif (run.path / phase / "metrics.jsonl").is_file():
            found[phase] = "begun"  # without a checkpoint so far
    if result := world_model_result(run):
        found |= {f"above {name}": f"{gap.value:+.1f} dB" for name, gap in result.psnr_gaps.items() if name == SHUFFLED_ACTIONS}
    for row in agent_rows(run):
        if row.role in ("agent", "bc"):
            found[f"{row.role}, {row.mode}" if row.mode else row.role] = f"{row.returns.value:.2f}"
    spent = run.spent()
    if spent["stages"]:
        found["time"] = duration(sum(float(stage["seconds"]) for stage in spent["stages"].values()))
    hardware = spent.get("hardware", {})
    found["device"] = hardware.get("GPU", hardware.get("CPU", ""))
    revisions = [revision for revision in spent.get("revisions", []) if revision]  # null: not from a git checkout
    found["revision"] = " ".join(revision[:7] + ("+" if "+" in revision else "") for revision in revisions)
    return found


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---- curves ---------------------------------------------------------------------------------------------------------------------


def _metrics(path: Path) -> dict[str, dict[str, Curve]]:
    """By phase and key."""
    return {phase: read_metrics(file) for phase in PHASES if (file := path / phase / "metrics.jsonl").is_file()}


def _charts(groups: dict[str, list[dict[str, dict[str, Curve]]]]) -> list[Chart]:
    charts = []
    for title, phase, keys, options in CHARTS:
        log_y, y_label = options.get("log_y", False), options.get("y_label", "")
        for key, label in keys.items():
            curves = {name: [m[phase][key] for m in metrics if key in m.get(phase, {})] for name, metrics in groups.items()}
            lines = [_line(name, found, log_y, style) for style, (name, found) in enumerate(curves.items()) if found]
            lines = [line for line in lines if line.x]
            if lines:
                charts.append(Chart(f"{title}, {label}", lines, y_label=y_label, log_y=log_y))
    return charts


def _line(label: str, curves: list[Curve], log_y: bool, style: int) -> Line:
    """The mean of several seeds at the steps that all of them have. What cannot be drawn (NaN of a run that diverged) is a gap."""
    at = [{x: y for x, y in zip(*curve, strict=True) if math.isfinite(y) and (y > 0 or not log_y)} for curve in curves]
    steps = sorted(set.intersection(*(set(points) for points in at)))
    values = np.array([[points[x] for x in steps] for points in at], np.float64)
    if len(at) == 1 or not steps:
        return Line(label, steps, values[0].tolist(), style=style)
    return Line(label, steps, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist(), style)


def _label(entries: list[Entry]) -> str:
    if len(entries) == 1:
        return str(entries[0].path)
    return f"{os.path.commonpath([entry.path for entry in entries])}: {len(entries)} seeds"
