"""Open-loop dreams scored in latent space, for latents that cannot be decoded or whose recorded frames are elsewhere.

Shape letters: B windows, T latent steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamer.data import LatentStore, PretokenizedDataset
from dreamer.data.pretokenized_dataset import Ids
from dreamer.evaluation.intervals import Interval, bootstrap_interval
from dreamer.evaluation.open_loop import BATCH, other_windows
from dreamer.evaluation.video import SHUFFLED_ACTIONS, TRUE_ACTIONS, mean_of_sums
from dreamer.imagination import Sampler
from dreamer.types import Batch

COPY_LAST_STEP = "copy last step"


@dataclass(frozen=True)
class LatentResult:
    """Mean squared errors of normalised latents: 1 is about the error of predicting their mean."""

    mse: dict[str, Interval]  # by name: TRUE_ACTIONS, SHUFFLED_ACTIONS (where other windows are there), COPY_LAST_STEP
    num_episodes: int
    num_windows: int
    context: int  # recorded latent steps that the model sees first
    horizon: int  # latent steps that it predicts after them

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatentResult:
        return cls(**{**data, "mse": {name: Interval.from_json(figure) for name, figure in data["mse"].items()}})


def draw_latent_windows(
    latents: LatentStore, episodes: Ids, *, num_steps: int, num_windows: int, seed: int
) -> tuple[Batch, Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Windows of ``num_steps`` latent steps, spread evenly over ``episodes``, at places that ``seed`` decides; their episodes, and the
    steps of these that they begin with.

    Raises ``ValueError`` if no episode is long enough.
    """
    ids = np.asarray(episodes)
    long = ids[latents.lengths[ids] >= num_steps]
    if len(long) == 0:
        longest = int(latents.lengths[ids].max(initial=0))
        raise ValueError(f"{latents.path}: windows of {num_steps} steps do not fit: the longest episode to draw from has {longest}")
    rng = np.random.default_rng(seed)
    if len(long) == 2:  # an odd number could not trade actions between the two
        num_windows -= num_windows % 2
    chosen = np.resize(rng.permutation(long), num_windows)
    rows = [(int(e), int(rng.integers(latents.lengths[e] - num_steps + 1))) for e in chosen]
    return PretokenizedDataset(latents, num_steps, long).batch(rows), chosen, np.array([start for _, start in rows])


@torch.no_grad()
def score_latent_dreams(
    sampler: Sampler, batch: Batch, episodes: Int[np.ndarray, " B"], starts: Int[np.ndarray, " B"], context: int, seed: int
) -> LatentResult:
    """Dreams with the true actions and with those of another window (``other_windows``), from the same noise, and the last context step
    held still.

    Intervals are 95 % bootstraps over episodes.
    """
    truth = batch.latents[:, context:]
    actions, known = batch.prev_actions, batch.prev_action_mask
    errors = {TRUE_ACTIONS: _errors(_dream(sampler, batch, context, actions, known, seed), truth)}
    other = other_windows(episodes, starts, truth.shape[1], torch.Generator().manual_seed(seed))
    if other is not None:
        actions, known = actions.clone(), known.clone()
        actions[:, context:], known[:, context:] = actions[other, context:], known[other, context:]
        errors[SHUFFLED_ACTIONS] = _errors(_dream(sampler, batch, context, actions, known, seed), truth)
    errors[COPY_LAST_STEP] = _errors(batch.latents[:, context - 1 : context].expand_as(truth), truth)
    units, unit_of_row = np.unique(episodes, return_inverse=True)

    def interval(values: Float[np.ndarray, " B"]) -> Interval:
        sums = np.zeros((len(units), 2))
        np.add.at(sums, unit_of_row, np.stack([values, np.ones(len(values))], axis=1))
        return bootstrap_interval(sums, mean_of_sums, seed=seed)

    mse = {name: interval(values) for name, values in errors.items()}
    return LatentResult(mse, num_episodes=len(units), num_windows=len(truth), context=context, horizon=truth.shape[1])


def _dream(sampler: Sampler, batch: Batch, context: int, actions: Tensor, known: Tensor, seed: int) -> Float[Tensor, "B R N Z"]:
    device = sampler.dynamics.device
    parts = []
    for start in range(0, len(actions), BATCH):
        rows = slice(start, start + BATCH)
        past, task, given, mask = (x[rows].to(device) for x in (batch.latents[:, :context], batch.task, actions, known))
        generator = torch.Generator(device).manual_seed(seed + start)
        parts.append(sampler.generate(past, given, mask, task=task, generator=generator).cpu())
    return torch.cat(parts)


def _errors(predicted: Float[Tensor, "B R N Z"], truth: Float[Tensor, "B R N Z"]) -> Float[np.ndarray, " B"]:
    return (predicted - truth).square().mean((1, 2, 3)).double().numpy()
