"""Several runs of one recipe, which differ in their seed: each figure for every run, over all their episodes together, and its spread.

The pooled interval says how far the figure could move had other episodes been drawn, with these trained models. How far it moves
with other trainings is what the spread over the runs shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamer.evaluation.agent import AgentResult, difference_interval
from dreamer.evaluation.intervals import Interval, bootstrap_interval
from dreamer.evaluation.video import TRUE_ACTIONS, WorldModelResult, mean_of_sums, psnr_difference, psnr_of_mean


@dataclass(frozen=True)
class Figure:
    """One figure of several runs. ``pooled`` is None where it is not defined."""

    pooled: Interval | None  # over the episodes of all runs
    runs: tuple[Interval | None, ...]  # each run by itself

    @property
    def values(self) -> list[float]:
        """Those of the runs that have one."""
        return [run.value for run in self.runs if run is not None]

    @property
    def sd(self) -> float | None:
        """Standard deviation over the runs (n - 1); None for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        values = self.values
        return {
            "pooled": self.pooled.to_json() if self.pooled else None,
            "runs": [run.to_json() if run else None for run in self.runs],
            "min": min(values, default=None),
            "max": max(values, default=None),
            "sd": self.sd,
        }


def pool_world_models(results: Sequence[WorldModelResult], own_episodes: bool = True) -> dict[str, dict[str, Figure]]:
    """``{"psnr": {name: dB}, "ssim": {name: ...}, "psnr_gap": {name: dB by which true actions lie above it}}``.

    own_episodes: False where all runs were scored on the same recordings. Their errors on one episode are not independent, so the pooled
    figures then have no interval.
    Raises ``ValueError`` for results that were measured differently.
    """
    first = results[0]
    for result in results:
        for key in ("context", "horizon", "resolution"):
            if getattr(result, key) != getattr(first, key):
                raise ValueError(f"world models of several runs: {key} is {getattr(first, key)} in one, {getattr(result, key)} in another")
        if result.scores.keys() != first.scores.keys() or result.episode_sums.keys() != first.scores.keys():
            raise ValueError(
                f"world models of several runs: scores {sorted(first.scores)}, {sorted(result.scores)}, sums by episode for "
                f"{sorted(result.episode_sums)}; expected the same. Remove evaluation/world_model.json, run: dreamer evaluate world-model"
            )
    sums = {name: np.concatenate([np.asarray(result.episode_sums[name]) for result in results]) for name in first.scores}
    runs = {name: [result.scores[name] for result in results] for name in first.scores}

    def pooled(contributions: np.ndarray, statistic: Any) -> Interval:
        return bootstrap_interval(contributions if own_episodes else contributions.sum(0, keepdims=True), statistic)

    gaps = {}
    for name in first.psnr_gaps:
        both = np.column_stack([sums[TRUE_ACTIONS][:, 0], sums[name][:, [0, 2]]])
        gaps[name] = Figure(pooled(both, psnr_difference), tuple(result.psnr_gaps[name] for result in results))
    return {
        "psnr": {n: Figure(pooled(sums[n][:, [0, 2]], psnr_of_mean), tuple(s.psnr for s in runs[n])) for n in runs},
        "ssim": {n: Figure(pooled(sums[n][:, [1, 2]], mean_of_sums), tuple(s.ssim for s in runs[n])) for n in runs},
        "psnr_gap": gaps,
    }


def pool_episodes(results: Sequence[AgentResult]) -> AgentResult:
    """The episodes of one player in all runs, as those of one result."""
    lists = ([value for result in results for value in getattr(result, key)] for key in ("returns", "lengths", "successes", "seeds"))
    return AgentResult(results[0].name, *map(tuple, lists))


def pool_returns(runs: Sequence[Mapping[str, AgentResult]]) -> dict[str, dict[str, Figure]]:
    """``{"returns": ..., "success": ..., "way": ..., "differences": ...}`` from each run's results by player (``"agent sampled"``).

    ``way``: how far a trained player has come from random (0) to scripted (1). ``differences``: imagination RL minus a baseline,
    over pairs of the same episode. What needs a player that is missing is left out. Raises ``ValueError`` for different players.
    """
    players = list(runs[0])
    for run in runs:
        if set(run) != set(players):
            raise ValueError(f"agents of several runs: one evaluated {sorted(players)}, another {sorted(run)}; expected the same players")
    everyone = {player: pool_episodes([run[player] for run in runs]) for player in players}
    all_of = [everyone, *runs]
    figures: dict[str, dict[str, Figure]] = {"returns": {}, "success": {}, "way": {}, "differences": {}}
    for player in players:
        figures["returns"][player] = _figure([results[player].mean_return for results in all_of])
        if everyone[player].successes:
            figures["success"][player] = _figure([results[player].success_rate for results in all_of])
        if player.endswith((" sampled", " argmax")) and {"random", "scripted"} <= set(players):
            figures["way"][player] = _figure([way(results[player], results["random"], results["scripted"]) for results in all_of])
    for mode in ("sampled", "argmax"):
        for baseline in ("bc", "bc_long"):
            agent, other = f"agent {mode}", f"{baseline} {mode}"
            if {agent, other} <= set(players):
                figures["differences"][f"{agent} - {other}"] = _figure([difference_interval(r[agent], r[other]) for r in all_of])
    return figures


def way(result: AgentResult, random: AgentResult, scripted: AgentResult) -> Interval | None:
    """(mean - random) / (scripted - random), resampled over the episodes that all three played; None if scripted is not above random.

    Without an interval where a resampled scripted player is not above the random one: there are too few episodes.
    """
    if not result.seeds == random.seeds == scripted.seeds:
        raise ValueError(f"{result.name}: played other episodes than the random and the scripted player; expected the same seeds")
    if not scripted.mean > random.mean:
        return None
    returns = np.column_stack([result.returns, random.returns, scripted.returns]).astype(np.float64)
    is_defined = True

    def share(total: np.ndarray) -> Any:
        nonlocal is_defined
        whole = total[..., 2] - total[..., 1]
        is_defined = is_defined and bool((whole > 0).all())
        return (total[..., 0] - total[..., 1]) / np.where(whole > 0, whole, 1.0)

    found = bootstrap_interval(returns, share)
    return found if is_defined else Interval(found.value)


def _figure(values: Sequence[Interval | None]) -> Figure:
    """The first is of all runs together."""
    return Figure(values[0], tuple(values[1:]))
