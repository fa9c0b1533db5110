"""Intervals: how far a figure could move had other episodes been drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval. ``low`` and ``high`` are None where one episode alone cannot give an interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Interval:
        return cls(*(None if data[key] is None else float(data[key]) for key in ("value", "low", "high")))  # pyright: ignore[reportArgumentType]


def bootstrap_interval(
    contributions: Float[np.ndarray, "n k"],
    statistic: Callable[[Float[np.ndarray, "*s k"]], Float[np.ndarray, "*s"] | float],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over ``n`` independent units (episodes).

    Each unit adds one row of ``k`` numbers to a total, and ``statistic`` turns totals into the figure. A mean is thus
    ``contributions = [[sum, count], ...]`` with ``statistic = total[..., 0] / total[..., 1]``: units of different sizes keep
    their weight, and paired differences resample both sides together.
    """
    n = len(contributions)
    if n < 1:
        raise ValueError("bootstrap_interval: no units; expected at least one episode")
    value = float(statistic(contributions.sum(0)))
    if n == 1:
        return Interval(value)
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples)
    resampled = statistic(times_drawn @ contributions)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def share_interval(values: Bool[np.ndarray, " n"]) -> Interval:
    """The share of True with its 95 % Wilson score interval, which has a width at 0 and 1 too."""
    n, share, z = len(values), float(np.mean(values)), 1.959964
    center, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(share, max(0.0, float(center - spread) / scale), min(1.0, float(center + spread) / scale))


def mean_interval(values: Float[np.ndarray, " n"], *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of one number per episode with its bootstrap interval."""
    contributions = np.stack([values, np.ones(len(values))], axis=-1).astype(np.float64)
    return bootstrap_interval(contributions, lambda t: t[..., 0] / t[..., 1], level=level, num_resamples=num_resamples, seed=seed)
