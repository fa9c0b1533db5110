"""The key figures of a run, as lines of text."""

from __future__ import annotations

from dreamer.evaluation.intervals import Interval
from dreamer.pipeline.report import ResultKey, agent_rows, latent_result, world_model_result
from dreamer.pipeline.run import Run


def key_figures(run: Run) -> list[str]:
    """World model, returns, time and memory; what is missing is left out."""
    lines = []
    kinds: dict[ResultKey, str] = {"result": "held-out", "training": "training"}
    for key, kind in kinds.items():
        if result := world_model_result(run, key):
            lines.append(f"world model, {result.horizon} frames open loop on {result.num_episodes} {kind} episodes")
            for name, score in result.scores.items():
                gap = f", {_interval(result.psnr_gaps[name], 1)} dB below the true actions" if name in result.psnr_gaps else ""
                lines.append(f"  {name:<24} PSNR {_interval(score.psnr, 1)} dB, SSIM {score.ssim.value:.3f}{gap}")
        if latents := latent_result(run, key):
            lines.append(f"world model, {latents.horizon} latent steps open loop on {latents.num_episodes} {kind} episodes")
            lines += [f"  {name:<24} mean squared error {_interval(figure, 3)}" for name, figure in latents.mse.items()]
    if rows := agent_rows(run):
        lines.append(f"mean return over {rows[-1].num_episodes} episodes in the real environment")
        for row in rows:
            label = row.label if row.mode is None else f"{row.label}, {row.mode}"
            success = f", success {_interval(row.success, 0, 100.0)} %" if row.success else ""
            lines.append(f"  {label:<36} {_interval(row.returns, 2)}{success}")
    stages = run.spent()["stages"]
    if stages:
        seconds = sum(stage["seconds"] for stage in stages.values())
        lines.append(f"time {seconds / 60:.1f} min, peak memory {max(s['peak_memory_mb'] for s in stages.values()) / 1000:.2f} GB")
    return lines


def _interval(figure: Interval, digits: int, scale: float = 1.0) -> str:
    value = f"{scale * figure.value:.{digits}f}"
    if figure.low is None or figure.high is None:
        return value
    return f"{value} [{scale * figure.low:.{digits}f}, {scale * figure.high:.{digits}f}]"
