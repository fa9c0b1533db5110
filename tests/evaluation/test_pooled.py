"""Several runs taken together, by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.intervals import Interval
from dreamer.evaluation.pooled import Figure, pool_episodes, pool_returns, pool_world_models, way
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, TRUE_ACTIONS, WorldModelResult, score_open_loop


def world_model(*errors: int, copied: int = 20) -> WorldModelResult:
    """An episode for each error: true actions are off by it, the copied frame by ``copied``."""
    truth = torch.full((len(errors), 2, 3, 16, 16), 100, dtype=torch.uint8)
    offsets = torch.tensor(errors, dtype=torch.uint8)[:, None, None, None, None]
    predictions = {TRUE_ACTIONS: truth + offsets, COPY_LAST_FRAME: truth + copied, RECONSTRUCTION: truth}
    return score_open_loop(truth, predictions, context=1, fps=8.0)


def db(mse: float) -> float:
    return 10 * math.log10(255**2 / mse)


def test_psnr_is_pooled_over_the_errors_of_all_episodes() -> None:
    figures = pool_world_models([world_model(2, 4), world_model(6)])
    psnr = figures["psnr"][TRUE_ACTIONS]
    assert psnr.pooled is not None and psnr.pooled.low is not None and psnr.pooled.high is not None
    assert psnr.pooled.value == pytest.approx(db((4 + 16 + 36) / 3))  # not the mean of the runs' PSNR
    assert psnr.values == pytest.approx([db(10), db(36)])
    assert psnr.pooled.low < psnr.pooled.value < psnr.pooled.high
    gap = figures["psnr_gap"][COPY_LAST_FRAME]
    assert gap.pooled is not None and gap.pooled.value == pytest.approx(db(56 / 3) - db(400))
    same = figures["ssim"][RECONSTRUCTION].pooled
    assert same is not None and (same.value, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    json.dumps({kind: {name: figure.to_json() for name, figure in group.items()} for kind, group in figures.items()}, allow_nan=False)


def test_one_run_pooled_is_that_run() -> None:
    result = WorldModelResult.from_json(json.loads(json.dumps(world_model(2, 4, 9).to_json())))
    figures = pool_world_models([result])
    assert figures["psnr"][TRUE_ACTIONS].pooled == result.scores[TRUE_ACTIONS].psnr
    assert figures["ssim"][TRUE_ACTIONS].pooled == result.scores[TRUE_ACTIONS].ssim
    assert figures["psnr_gap"][COPY_LAST_FRAME].pooled == result.psnr_gaps[COPY_LAST_FRAME]


def test_world_models_that_were_measured_differently_are_refused() -> None:
    first = world_model(2, 4)
    with pytest.raises(ValueError, match="horizon is 2 in one, 3 in another"):
        pool_world_models([first, dataclasses.replace(first, horizon=3)])
    with pytest.raises(ValueError, match="Remove evaluation/world_model.json"):
        pool_world_models([first, dataclasses.replace(first, episode_sums={})])


def test_spread_over_runs() -> None:
    figure = Figure(Interval(2.0), (Interval(1.0), None, Interval(3.0)))
    assert figure.to_json() == {
        "pooled": {"value": 2.0, "low": None, "high": None},
        "runs": [{"value": 1.0, "low": None, "high": None}, None, {"value": 3.0, "low": None, "high": None}],
        "min": 1.0,
        "max": 3.0,
        "sd": pytest.approx(math.sqrt(2)),
    }
    assert Figure(None, (Interval(1.0),)).sd is None and Figure(None, (None,)).to_json()["min"] is None


def played(name: str, *returns: float, first_seed: int = 0) -> AgentResult:
    count = len(returns)
    return AgentResult(name, returns, (5,) * count, tuple(r > 2 for r in returns), tuple(range(first_seed, first_seed + count)))


def run(first_seed: int, **returns: tuple[float, ...]) -> dict[str, AgentResult]:
    return {name.replace("__", " "): played(name, *values, first_seed=first_seed) for name, values in returns.items()}


def two_runs() -> list[dict[str, AgentResult]]:
    one = run(0, random=(0.0, 1.0), scripted=(4.0, 5.0), bc__sampled=(1.0, 2.0), agent__sampled=(3.0, 4.0))
    other = run(2, random=(1.0, 0.0), scripted=(6.0, 5.0), bc__sampled=(1.0, 1.0), agent__sampled=(5.0, 6.0))
    return [one, other]


def test_returns_are_pooled_over_episodes() -> None:
    figures = pool_returns(two_runs())
    returns = figures["returns"]["agent sampled"]
    assert returns.pooled is not None and returns.pooled.value == 4.5 and returns.values == [3.5, 5.5]
    success = figures["success"]["bc sampled"]
    assert success.pooled is not None and success.pooled.value == 0.0
    assert set(figures["differences"]) == {"agent sampled - bc sampled"}
    difference = figures["differences"]["agent sampled - bc sampled"]
    assert difference.pooled is not None and difference.pooled.value == 3.25 and difference.values == [2.0, 4.5]
    assert difference.pooled.low == 2.0 and difference.pooled.high is not None and 4.0 < difference.pooled.high <= 5.0
    assert difference.runs[0] == Interval(2.0, 2.0, 2.0)  # in pairs: always 2, though the returns overlap
    ways = figures["way"]
    assert set(ways) == {"bc sampled", "agent sampled"}
    assert ways["agent sampled"].values == pytest.approx([3 / 4, 5 / 5])
    assert ways["agent sampled"].pooled is not None and ways["agent sampled"].pooled.value == pytest.approx(4 / 4.5)


def test_pooled_episodes_keep_their_order() -> None:
    pooled = pool_episodes([r["agent sampled"] for r in two_runs()])
    assert pooled.returns == (3.0, 4.0, 5.0, 6.0) and pooled.seeds == (0, 1, 2, 3) and len(pooled.lengths) == 4


def test_the_way_is_not_defined_below_a_scripted_player_that_is_no_better() -> None:
    assert way(played("a", 1.0, 2.0), played("random", 3.0, 3.0), played("scripted", 3.0, 3.0)) is None
    sometimes = way(played("a", 1.0, 2.0), played("random", 0.0, 3.0), played("scripted", 2.0, 3.0))
    assert sometimes == Interval(0.0)  # the second episode alone would divide by zero: no interval
    with pytest.raises(ValueError, match="played other episodes"):
        way(played("a", 1.0, first_seed=7), played("random", 0.0), played("scripted", 2.0))


def test_runs_with_other_players_are_refused() -> None:
    one, other = two_runs()
    del other["bc sampled"]
    with pytest.raises(ValueError, match="expected the same players"):
        pool_returns([one, other])
