"""Results of several runs as files for people: a Markdown page with every figure, and one picture of the main ones."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.media import write_atomic
from dreamer.evaluation.pooled import Figure
from dreamer.evaluation.report import duration
from dreamer.evaluation.video import RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS
from dreamer.pipeline.results import Results
from dreamer.pipeline.run import write_json
from dreamer.pipeline.targets import text
from dreamer.yaml_config import save_config

BLUE, ORANGE, GREY, GREEN = "#3a7cc8", "#d9792b", "#8c8c8c", "#4b9b61"
KIND_COLOURS = {TRUE_ACTIONS: BLUE, SHUFFLED_ACTIONS: ORANGE, RECONSTRUCTION: GREEN}
ROLE_COLOURS = {"agent": BLUE, "bc": ORANGE, "bc_long": ORANGE, "scripted": GREEN}


def write_results(results: Results, out: Path) -> None:
    """Write ``out/results.json``, ``README.md``, ``summary.png``, and of the first run ``report.html`` and ``config.yaml``."""
    report = (results.runs[0].path / "report.html").read_bytes()
    page, picture = markdown(results), summary_picture(results)
    write_json(out / "results.json", results.to_json())
    write_atomic(out / "README.md", page.encode())
    write_atomic(out / "summary.png", picture)
    write_atomic(out / "report.html", report)
    save_config(results.runs[0].config, out / "config.yaml")


# The page


def markdown(results: Results) -> str:
    """The page. Everything on it is in results.json too."""
    return "\n".join([*_head(results), *_checks(results), *_world_model(results), *_agents(results), *_spent(results), *_made_by(results)])


def _head(results: Results) -> list[str]:
    config = results.runs[0].config
    seeds = ", ".join(map(str, results.seeds))
    notice = [f"**{config.report.notice}**", ""] if config.report.notice else []
    return [
        f"# {config.report.title}: {len(results.runs)} seeds",
        "",
        *notice,
        f"Seeds {seeds}, each the whole way from recordings to evaluation. Brackets hold 95 % bootstrap intervals over episodes; *pooled*",
        "is over the episodes of all seeds together; *s.d.* is the spread of the seeds' means. [results.json](results.json) holds it all,",
        f"[report.html](report.html) is the report of seed {results.seeds[0]}, [config.yaml](config.yaml) its complete settings.",
        "",
        "![summary](summary.png)",
        "",
    ]


def _checks(results: Results) -> list[str]:
    if not results.checks:
        return []
    count = len(results.runs)
    rows = [
        [c.target, "**met**" if c.is_met else "**NOT met**", c.measured, "" if c.num_runs_met is None else f"{c.num_runs_met} of {count}"]
        for c in results.checks
    ]
    met = sum(check.is_met for check in results.checks)
    return [
        "## What was to be shown",
        "",
        f"{met} of {len(results.checks)} targets are met. The verdict is about the pooled figure; the last column counts the seeds that",
        "meet the target by themselves, with fewer episodes and so wider intervals.",
        "",
        *_table(["target", "verdict", "measured", "seeds alone"], rows),
    ]


def _world_model(results: Results) -> list[str]:
    first, episodes = results.runs[0].world_model, ", ".join(str(run.world_model.num_episodes) for run in results.runs)
    training = []
    if "training_psnr" in results.figures:
        training = ["The same on training episodes, where what was learned by heart counts:", ""]
        training += _table(_columns(results), _dream_rows(results, "training_"))
    return [
        "## World model",
        "",
        f"{first.horizon} frames open loop after {first.context} recorded ones, on held-out episodes ({episodes}). PSNR is that of the",
        "mean squared error over everything; *shuffled actions*: those of another window.",
        "",
        *_table(_columns(results), _dream_rows(results)),
        *training,
    ]


def _dream_rows(results: Results, prefix: str = "") -> list[list[str]]:
    psnr, ssim, gap = (results.figures[f"{prefix}{kind}"] for kind in ("psnr", "ssim", "psnr_gap"))
    rows = [[f"PSNR, {name}, dB", *_cells(results, figure, 2)] for name, figure in psnr.items()]
    rows += [[f"SSIM, {name}", *_cells(results, figure, 3)] for name, figure in ssim.items()]
    return rows + [[f"PSNR, {TRUE_ACTIONS} above {name}, dB", *_cells(results, figure, 2)] for name, figure in gap.items()]


def _agents(results: Results) -> list[str]:
    figures = results.figures
    if "returns" not in figures:
        return []
    labels = results.runs[0].labels
    rows = [[labels[player], *_cells(results, figure, 2)] for player, figure in figures["returns"].items()]
    episodes = len(next(iter(results.runs[0].agents.values())).returns)
    note = results.runs[0].config.report.returns_note
    lines = [
        "## Return in the real environment",
        "",
        f"{episodes} episodes a seed, the same for everybody. {note}".rstrip(),
        "",
        *_table(_columns(results), rows),
    ]
    if figures["differences"]:
        names = [(name, *name.split(" - ")) for name in figures["differences"]]
        rows = [
            [f"{labels[agent]} above {labels[other]}", *_cells(results, figures["differences"][name], 2)] for name, agent, other in names
        ]
        lines += ["Differences over pairs of the same episode:", "", *_table(_columns(results), rows)]
    if figures["way"]:
        rows = [[labels[player], *_cells(results, figure, 1, 100.0)] for player, figure in figures["way"].items()]
        lines += ["How far from random (0 %) to the scripted player (100 %):", "", *_table(_columns(results), rows)]
    if figures["success"]:
        rows = [[labels[player], *_cells(results, figure, 1, 100.0)] for player, figure in figures["success"].items()]
        lines += ["Successful episodes, %:", "", *_table(_columns(results), rows)]
    return lines


def _spent(results: Results) -> list[str]:
    stages = list(dict.fromkeys(stage for run in results.runs for stage in run.seconds))
    rows = [[stage, *(duration(run.seconds[stage]) if stage in run.seconds else "" for run in results.runs)] for stage in stages]
    rows.append(["**all**", *(f"**{duration(sum(run.seconds.values()))}**" for run in results.runs)])
    rows.append(["peak memory", *(f"{run.peak_memory_mb / 1000:.2f} GB" for run in results.runs)])
    return ["## Time and memory", "", *_table(["stage", *(f"seed {seed}" for seed in results.seeds)], rows)]


def _made_by(results: Results) -> list[str]:
    facts: dict[str, list[str]] = {}
    for run in results.runs:
        facts.setdefault("command of each seed", []).append(f"`{run.spent.get('command')}`")
        facts.setdefault("revision", []).append(", ".join(str(r) for r in run.spent.get("revisions", ["unknown"])))
        for name, value in (run.spent.get("hardware", {}) | run.spent.get("versions", {})).items():
            facts.setdefault(name, []).append(value)
    rows = [[name, "<br>".join(dict.fromkeys(values))] for name, values in facts.items()]
    return ["## How it was made", "", "```", results.command, "```", "", *_table(["", ""], rows)]


def _columns(results: Results) -> list[str]:
    return ["", *(f"seed {seed}" for seed in results.seeds), "pooled", "min to max", "s.d."]


def _cells(results: Results, figure: Figure, digits: int, scale: float = 1.0) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{scale * value:.{digits}f}"

    values = figure.values
    spread = f"{number(min(values))} to {number(max(values))}" if values else ""
    return [*(text(run, digits, scale) for run in figure.runs), text(figure.pooled, digits, scale), spread, number(figure.sd)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows), ""]


# The picture


def summary_picture(results: Results) -> bytes:
    """A PNG: PSNR with its horizon, PSNR by kind of prediction, and returns; dots are seeds, bars are pooled 95 % intervals."""
    from matplotlib.figure import Figure as Canvas  # imports for a second: only where it is wanted

    has_agents = "returns" in results.figures
    canvas = Canvas(figsize=(13.5 if has_agents else 8.5, 4.2), layout="constrained")
    axes = canvas.subplots(1, 3 if has_agents else 2, width_ratios=[1, 1.1, 1.3] if has_agents else [1, 1.1])
    _draw_horizon(axes[0], results)
    rows = {name: (name, KIND_COLOURS.get(name, GREY)) for name in results.figures["psnr"]}
    _draw_figures(axes[1], rows, results.figures["psnr"], "PSNR of all these frames, dB")
    if has_agents:
        labels = results.runs[0].labels
        rows = {key: (labels[key], ROLE_COLOURS.get(key.split()[0], GREY)) for key in results.figures["returns"]}
        _draw_figures(axes[2], rows, results.figures["returns"], "mean return in the real environment")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    seeds = ", ".join(map(str, results.seeds))
    canvas.suptitle(f"{results.runs[0].config.report.title}. Seeds {seeds}: dots; pooled 95 % intervals over episodes: bars", fontsize=10)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw_horizon(axis, results: Results) -> None:
    for run in results.runs:
        for name, score in run.world_model.scores.items():
            steps = [step.value for step in score.psnr_per_step]
            label = name if run is results.runs[0] else None
            axis.plot(range(1, len(steps) + 1), steps, color=KIND_COLOURS.get(name, GREY), linewidth=1.2, label=label)
    axis.set_xlabel("frames after the last recorded one")
    axis.set_ylabel("PSNR, dB")
    axis.legend(fontsize=8, frameon=False)


def _draw_figures(axis, rows: Mapping[str, tuple[str, str]], figures: Mapping[str, Figure], title: str) -> None:
    """A row a figure: the pooled value with its interval, the runs as dots below."""
    for place, (name, (_, colour)) in enumerate(rows.items()):
        pooled = figures[name].pooled
        if pooled is not None:
            axis.errorbar(pooled.value, place, xerr=_arms(pooled), fmt="|", color=colour, markersize=14, capsize=4, linewidth=2.5)
            axis.annotate(f"{pooled.value:.2f}", (pooled.value, place - 0.22), ha="center", va="bottom", fontsize=8)
        axis.plot(figures[name].values, [place + 0.27] * len(figures[name].values), "o", color=colour, markersize=4, alpha=0.7)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows.values()], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(title)
    axis.grid(axis="x", linewidth=0.4)


def _arms(figure: Interval) -> list[list[float]] | None:
    """Lengths of the error bar; a bootstrap interval may, by rounding, not quite reach the figure."""
    if figure.low is None or figure.high is None:
        return None
    return [[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]]
