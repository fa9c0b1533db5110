"""What the demo promises, held against what several runs of it reached. Nothing is rounded in its favour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.pooled import Figure
from dreamer.evaluation.video import COPY_LAST_FRAME, SHUFFLED_ACTIONS

MIN_RUNS = 3
MIN_GAP = 3.0  # dB
MIN_WAY = 0.8  # from random to scripted
MAX_MINUTES = 15.0
MAX_GB = 4.0

Figures = dict[str, dict[str, Figure]]


@dataclass(frozen=True)
class Check:
    """One promise. ``is_met`` is about all runs together; ``num_runs_met`` counts the runs that keep it by themselves."""

    target: str
    is_met: bool
    measured: str
    num_runs_met: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "met": self.is_met, "measured": self.measured, "runs_that_meet_it_alone": self.num_runs_met}


def check_targets(figures: Figures, seconds: Sequence[float], peak_memory_mb: Sequence[float], hardware: Sequence[str]) -> list[Check]:
    """All promises. A figure that is missing is a promise that is not kept."""
    minutes, gigabytes = [s / 60 for s in seconds], [mb / 1000 for mb in peak_memory_mb]
    machines = "; ".join(dict.fromkeys(hardware))
    count = len(seconds)
    return [
        Check(f"at least {MIN_RUNS} seeds of the whole way", count >= MIN_RUNS, f"{count} seeds"),
        *(_gap(figures, name) for name in (SHUFFLED_ACTIONS, COPY_LAST_FRAME)),
        *(_apart(figures, mode, baseline) for mode in ("sampled", "argmax") for baseline in ("bc", "bc_long")),
        *(_way(figures, mode) for mode in ("sampled", "argmax")),
        _most("wall time of the whole demo", minutes, MAX_MINUTES, "minutes", f" ({machines})"),
        _most("peak memory", gigabytes, MAX_GB, "GB"),
    ]


def _gap(figures: Figures, name: str) -> Check:
    target = f"PSNR with true actions at least {MIN_GAP:g} dB above {name}"
    figure = figures.get("psnr_gap", {}).get(name)
    if figure is None or figure.pooled is None:
        return Check(target, False, "not measured")
    return Check(target, figure.pooled.value >= MIN_GAP, f"{text(figure.pooled)} dB", sum(v >= MIN_GAP for v in figure.values))


def _apart(figures: Figures, mode: str, baseline: str) -> Check:
    name = {"bc": "BC", "bc_long": "BC trained as long"}[baseline]
    target = f"imagination RL, {mode}, above {name}, {mode}, 95 % intervals apart"
    returns = figures.get("returns", {})
    agent, other = returns.get(f"agent {mode}"), returns.get(f"{baseline} {mode}")
    if agent is None or other is None or agent.pooled is None or other.pooled is None:
        return Check(target, False, "not measured")
    difference = figures["differences"][f"agent {mode} - {baseline} {mode}"].pooled
    pairs = f"; difference of pairs {text(difference)}" if difference else ""
    is_apart = [are_apart(a, b) for a, b in zip(agent.runs, other.runs, strict=True)]
    measured = f"{text(agent.pooled)} against {text(other.pooled)}{pairs}"
    return Check(target, are_apart(agent.pooled, other.pooled), measured, sum(is_apart))


def are_apart(above: Interval | None, below: Interval | None) -> bool:
    """Whether the whole interval of one lies above that of the other; without intervals nothing is known."""
    if above is None or below is None or above.low is None or below.high is None:
        return False
    return above.low > below.high


def _way(figures: Figures, mode: str) -> Check:
    target = f"imagination RL, {mode}, at least {100 * MIN_WAY:g} % of the way from random to scripted"
    figure = figures.get("way", {}).get(f"agent {mode}")
    if figure is None or figure.pooled is None:
        return Check(target, False, "not measured")
    return Check(target, figure.pooled.value >= MIN_WAY, f"{text(figure.pooled, 1, 100.0)} %", sum(v >= MIN_WAY for v in figure.values))


def _most(what: str, values: Sequence[float], limit: float, unit: str, note: str = "") -> Check:
    measured = f"{', '.join(f'{v:.2f}' for v in values)} {unit}{note}"
    return Check(f"{what} at most {limit:g} {unit}, each run", max(values) <= limit, measured, sum(v <= limit for v in values))


def text(figure: Interval | None, digits: int = 2, scale: float = 1.0) -> str:
    """``3.21 [3.05, 3.40]``; the value alone where there is no interval."""
    if figure is None:
        return "not defined"
    value = f"{scale * figure.value:.{digits}f}"
    if figure.low is None or figure.high is None:
        return value
    return f"{value} [{scale * figure.low:.{digits}f}, {scale * figure.high:.{digits}f}]"
