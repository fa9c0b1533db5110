"""How close dreamed frames come to recorded ones, and whether the actions matter.

**Aggregation.** The headline PSNR is the PSNR of the mean squared error over all episodes, frames, pixels and channels. The other usual
choice, the mean of each frame's PSNR, is kept beside it as ``mean_frame_psnr``: it is never lower (Jensen), and a few easy frames lift
it. Curves per horizon step take the mean squared error over the episodes at that step. SSIM is the plain mean of each frame's SSIM
(Gaussian window 11, sigma 1.5). Pixels are compared as uint8, peak 255.

**Cap.** Identical frames have an infinite PSNR, which JSON cannot hold: every PSNR is capped at ``MAX_PSNR`` = 100 dB. That is one grey
level of error in one of 150,000 values; no model comes near it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dreamer.evaluation.intervals import Interval, bootstrap_interval

MAX_PSNR = 100.0  # dB
PEAK = 255.0
MIN_SSIM_SIDE = 11  # the window must fit into the frame
TRUE_ACTIONS = "true actions"
SHUFFLED_ACTIONS = "shuffled actions"
COPY_LAST_FRAME = "copy last frame"
RECONSTRUCTION = "reconstruction"


def ssim_per_frame(predicted: UInt8[Tensor, "B T C H W"], target: UInt8[Tensor, "B T C H W"]) -> Float[Tensor, "B T"]:
    """SSIM of each frame, in [-1, 1]; 1 for identical frames. Frames must be at least 11 pixels high and wide."""
    _check_frames("predicted", predicted, target)
    if min(predicted.shape[-2:]) < MIN_SSIM_SIDE:
        raise ValueError(
            f"ssim_per_frame: frames are {tuple(predicted.shape[-2:])}; expected at least {MIN_SSIM_SIDE} x {MIN_SSIM_SIDE} pixels"
        )
    # One episode at a time: the filter needs ten times the memory of its frames.
    rows = [
        structural_similarity_index_measure(p.float(), t.float(), data_range=PEAK, reduction="none")
        for p, t in zip(predicted, target, strict=True)
    ]
    return torch.stack([torch.as_tensor(row).reshape(-1) for row in rows])


def psnr_of_mse(mse: np.ndarray | float) -> np.ndarray | float:
    """``10 log10(255^2 / mse)`` in dB, at most ``MAX_PSNR``."""
    floor = PEAK**2 / 10 ** (MAX_PSNR / 10)
    return 10 * np.log10(PEAK**2 / np.maximum(mse, floor))


@dataclass(frozen=True)
class VideoScore:
    """One way to predict the frames, against the recording."""

    psnr: Interval  # dB, of the mean squared error over everything
    ssim: Interval
    psnr_per_step: tuple[Interval, ...]  # index 0 is the first predicted frame
    ssim_per_step: tuple[Interval, ...]
    mean_frame_psnr: float  # dB, mean of each frame's PSNR: only for comparison with work that reports it so

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VideoScore:
        return cls(
            psnr=Interval.from_json(data["psnr"]),
            ssim=Interval.from_json(data["ssim"]),
            psnr_per_step=tuple(map(Interval.from_json, data["psnr_per_step"])),
            ssim_per_step=tuple(map(Interval.from_json, data["ssim_per_step"])),
            mean_frame_psnr=data["mean_frame_psnr"],
        )


@dataclass(frozen=True)
class WorldModelResult:
    """Open-loop prediction on held-out episodes. Intervals are 95 % bootstraps over episodes, not over windows or frames."""

    scores: dict[str, VideoScore]  # by name: TRUE_ACTIONS, SHUFFLED_ACTIONS, COPY_LAST_FRAME, RECONSTRUCTION, ...
    psnr_gaps: dict[str, Interval]  # dB by which TRUE_ACTIONS lies above the named score; resampled in pairs
    num_episodes: int
    num_windows: int
    context: int  # recorded frames that the model sees first
    horizon: int  # frames that it predicts after them
    resolution: tuple[int, int]  # height, width
    fps: float
    # By name, a row an episode: summed MSE of its windows, summed SSIM, number of windows. What taking several runs together needs.
    episode_sums: dict[str, tuple[tuple[float, float, float], ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "resolution": list(self.resolution)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorldModelResult:
        return cls(
            **{
                **data,
                "scores": {name: VideoScore.from_json(score) for name, score in data["scores"].items()},
                "psnr_gaps": {name: Interval.from_json(gap) for name, gap in data["psnr_gaps"].items()},
                "resolution": tuple(data["resolution"]),
                "episode_sums": {name: tuple(map(tuple, rows)) for name, rows in data.get("episode_sums", {}).items()},
            }
        )


def score_open_loop(
    truth: UInt8[Tensor, "B T C H W"],
    predictions: Mapping[str, UInt8[Tensor, "B T C H W"]],
    *,
    context: int,
    fps: float,
    episode_ids: Sequence[int] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> WorldModelResult:
    """Score predicted frames against the recorded ones, only the ``T`` frames after the context.

    ``episode_ids`` names each row's episode where several windows come from one (their errors are not independent, so the bootstrap draws
    whole episodes); without it every row is an episode of its own.
    """
    if not predictions:
        raise ValueError("score_open_loop: no predictions; expected at least one, for example {'true actions': frames}")
    ids = np.arange(len(truth)) if episode_ids is None else np.asarray(episode_ids)
    if ids.shape != (len(truth),):
        raise ValueError(f"score_open_loop: {ids.size} episode_ids for {len(truth)} rows of frames; expected one for each row")
    units, unit_of_row = np.unique(ids, return_inverse=True)

    def per_episode(values: Float[np.ndarray, "B k"]) -> Float[np.ndarray, "n k"]:
        sums = np.zeros((len(units), values.shape[1]))
        np.add.at(sums, unit_of_row, values)
        return sums

    counts = per_episode(np.ones((len(truth), 1)))
    bootstrap = {"num_resamples": num_resamples, "seed": seed}
    scores, mse_sums, episode_sums = {}, {}, {}
    for name, predicted in predictions.items():
        _check_frames(name, predicted, truth)
        mse = _mse_per_frame(predicted, truth)
        mse_sums[name] = per_episode(mse.mean(1, keepdims=True))
        ssim = ssim_per_frame(predicted, truth).double().cpu().numpy()
        scores[name] = _score(per_episode, counts, mse, ssim, bootstrap)
        sums = np.concatenate([mse_sums[name], per_episode(ssim.mean(1, keepdims=True)), counts], axis=1)
        episode_sums[name] = tuple((m, s, n) for m, s, n in sums.tolist())

    gaps = {}
    for name in scores:
        if TRUE_ACTIONS in scores and name not in (TRUE_ACTIONS, RECONSTRUCTION):
            pairs = np.concatenate([mse_sums[TRUE_ACTIONS], mse_sums[name], counts], axis=1)
            gaps[name] = bootstrap_interval(pairs, psnr_difference, **bootstrap)
    return WorldModelResult(
        scores=scores,
        psnr_gaps=gaps,
        num_episodes=len(units),
        num_windows=len(truth),
        context=context,
        horizon=truth.shape[1],
        resolution=(truth.shape[-2], truth.shape[-1]),
        fps=fps,
        episode_sums=episode_sums,
    )


def copy_last_frame(context_frames: UInt8[Tensor, "B F C H W"], horizon: int) -> UInt8[Tensor, "B {horizon} C H W"]:
    """The prediction that nothing changes: what a world model has to beat before its PSNR means anything."""
    return context_frames[:, -1:].expand(-1, horizon, -1, -1, -1)


def _score(per_episode: Any, counts: np.ndarray, mse: np.ndarray, ssim: np.ndarray, bootstrap: dict[str, int]) -> VideoScore:
    def interval(values: np.ndarray, statistic: Any) -> Interval:
        return bootstrap_interval(np.concatenate([per_episode(values[:, None]), counts], axis=1), statistic, **bootstrap)

    return VideoScore(
        psnr=interval(mse.mean(1), psnr_of_mean),
        ssim=interval(ssim.mean(1), mean_of_sums),
        psnr_per_step=tuple(interval(step, psnr_of_mean) for step in mse.T),
        ssim_per_step=tuple(interval(step, mean_of_sums) for step in ssim.T),
        mean_frame_psnr=float(np.mean(psnr_of_mse(mse))),
    )


def mean_of_sums(total: Float[np.ndarray, "*s 2"]) -> Any:
    """A statistic for ``bootstrap_interval``: [sum, count] -> mean."""
    return total[..., 0] / total[..., 1]


def psnr_of_mean(total: Float[np.ndarray, "*s 2"]) -> Any:
    """[sum of MSE, count] -> PSNR in dB."""
    return psnr_of_mse(mean_of_sums(total))


def psnr_difference(total: Float[np.ndarray, "*s 3"]) -> Any:
    """[sum of MSE, sum of the other's MSE, count] -> dB by which the first lies above the other."""
    return psnr_of_mse(total[..., 0] / total[..., 2]) - psnr_of_mse(total[..., 1] / total[..., 2])


def _mse_per_frame(predicted: Tensor, target: Tensor) -> Float[np.ndarray, "B T"]:
    rows = [(p.float() - t.float()).square().mean((1, 2, 3)) for p, t in zip(predicted, target, strict=True)]
    return torch.stack(rows).double().cpu().numpy()


def _check_frames(name: str, predicted: Tensor, target: Tensor) -> None:
    for label, frames in ((name, predicted), ("target", target)):
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.numel() == 0:
            raise ValueError(f"{label}: frames are {frames.dtype} {tuple(frames.shape)}; expected uint8 (B, T, C, H, W), not empty")
    if predicted.shape != target.shape:
        raise ValueError(f"{name}: frames are {tuple(predicted.shape)}, the recorded ones {tuple(target.shape)}; expected the same shape")
