"""What a run's folder holds, put on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dreamer.data.files import read_json
from dreamer.evaluation.charts import Chart, metrics_chart, read_metrics
from dreamer.evaluation.latent_dreams import LatentResult
from dreamer.evaluation.report import AgentClip, DreamClip, KeyFigure, Reconstructions, ReportData, ReturnRow, write_report
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS, WorldModelResult
from dreamer.pipeline.evaluate import read_clips
from dreamer.pipeline.run import Run
from dreamer.pipeline.run_files import AgentFile, LatentFile, WorldModelFile, read_file
from dreamer.training.checkpoint import read_tensors

Curves = dict[str, str]
ResultKey = Literal["result", "training"]
# title, run, {key of metrics.jsonl: label}, options of the chart
CHARTS: list[tuple[str, str, Curves, dict[str, Any]]] = [
    (
        "Phase 0: reconstruction",
        "tokenizer",
        {"val_psnr": "held-out frames", "val_psnr_mean_image": "their mean image"},
        {"y_label": "PSNR, dB"},
    ),
    ("Phase 1: world model", "phase1", {"flow_loss": "training", "val_flow_loss": "held out"}, {"log_y": True, "y_label": "flow loss"}),
    (
        "Phase 1: dreams of held-out episodes",
        "phase1",
        {"val_dream_psnr": TRUE_ACTIONS, "val_dream_psnr_shuffled": SHUFFLED_ACTIONS},
        {"y_label": "PSNR, dB"},
    ),
    ("Phase 2: behaviour cloning", "phase2", {"policy_loss": "training", "val_bc_loss": "held out"}, {"y_label": "nats an action"}),
    (
        "Phase 2: the world model stays",
        "phase2",
        {"val_flow_loss": "held-out flow loss", "val_reward_error": "reward error"},
        {},
    ),
    (
        "Phase 3: imagined return",
        "phase3",
        {"imagined_return": "training", "val_imagined_return": "held-out contexts", "val_value": "value"},
        {"caption": "Imagined reward alone is no evidence: the table above is."},
    ),
    ("Phase 3: policy", "phase3", {"kl": "KL to the cloned policy", "entropy": "entropy"}, {"y_label": "nats"}),
]
_AGAIN = "remove it and run dreamer evaluate again"
MOST_CLIPS = ("scripted", "bc sampled", "agent sampled", "bc argmax", "agent argmax")  # shown of those who played, in this order


def write_run_report(run: Run) -> bool:
    """``report.html``, from whatever is there. Made anew each time: it takes a moment."""
    config, spent = run.config, run.spent()
    charts = [chart for args in CHARTS if (chart := _chart(run, *args))]
    if not charts and not spent["stages"]:
        raise ValueError(f"{run.path}: no stage of a run was begun here; there is nothing to report on")
    world_model, dreams, reconstructions = _world_model(run)
    returns, clips = _agents(run)
    write_report(
        run.report_path,
        ReportData(
            title=config.report.title,
            summary=config.report.summary,
            notice=config.report.notice,
            dreams=dreams,
            world_model=world_model,
            action_gap=_action_gap(run),
            returns=returns,
            returns_note=config.report.returns_note,
            agent_clips=clips,
            reconstructions=reconstructions,
            training_charts=charts,
            key_figures=[*_latent_figures(run), *_training_figures(run), *_memory_figure(spent)],
            limits=config.report.limits,
            command=run.command,
            seed=config.seed,
            hardware=spent.get("hardware", {}),
            wall_seconds={name: float(stage["seconds"]) for name, stage in spent["stages"].items() if name != "report"},
            config=config.model_dump(mode="json"),
        ),
    )
    return True


def world_model_result(run: Run, key: ResultKey = "result") -> WorldModelResult | None:
    """Of held-out episodes, or with the key ``training`` of training episodes, where these were scored."""
    path = run.evaluation_path / "world_model.json"
    return getattr(read_file(path, WorldModelFile, _AGAIN), key) if path.exists() else None


def latent_result(run: Run, key: ResultKey = "result") -> LatentResult | None:
    """What stands for ``world_model_result`` where dreams were scored in latent space."""
    path = run.evaluation_path / "world_model_latents.json"
    return getattr(read_file(path, LatentFile, _AGAIN), key) if path.exists() else None


def _latent_figures(run: Run) -> list[KeyFigure]:
    if (result := latent_result(run)) is None:
        return []
    note = f"mean squared error of dreamed latents over {result.horizon} steps, {result.num_episodes} held-out episodes"
    return [KeyFigure(f"{figure.value:.3f}", f"latent error, {name}", note) for name, figure in result.mse.items()]


def _training_figures(run: Run) -> list[KeyFigure]:
    """Gaps on training episodes, for those on held-out ones to be held against."""
    if (result := world_model_result(run, "training")) is None:
        return []
    note = f"{result.num_episodes} episodes that the model trained on, {result.horizon} steps ahead: what it knows by heart counts here"
    return [KeyFigure(f"{gap.value:+.1f} dB", f"PSNR above {name}, training episodes", note) for name, gap in result.psnr_gaps.items()]


def _memory_figure(spent: dict[str, Any]) -> list[KeyFigure]:
    peak = max((stage["peak_memory_mb"] for stage in spent["stages"].values()), default=0.0)
    return [KeyFigure(f"{peak / 1000:.1f} GB", "peak memory", "of the whole process")] if peak else []


def agent_rows(run: Run) -> list[ReturnRow]:
    path = run.evaluation_path / "agent.json"
    rows = read_file(path, AgentFile, _AGAIN).rows if path.exists() else []
    try:
        return [ReturnRow.of(row.label, row.role, row.result, row.mode) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); {_AGAIN}") from error


def _world_model(run: Run) -> tuple[WorldModelResult | None, list[DreamClip], Reconstructions | None]:
    result = world_model_result(run)
    if result is None:
        return None, [], None
    path = run.evaluation_path / "world_model_clips.safetensors"
    truth = read_tensors(path)["truth"]
    dreamed = read_clips(path, "dream")
    names = [name for name in (TRUE_ACTIONS, SHUFFLED_ACTIONS) if name in dreamed]
    clips = [
        DreamClip(truth[i], {name: dreamed[name][i] for name in names}, context=result.context, fps=result.fps) for i in range(len(truth))
    ]
    assert {COPY_LAST_FRAME, RECONSTRUCTION} <= dreamed.keys()
    pairs = read_clips(path, "reconstruction")
    return result, clips, Reconstructions(pairs["recorded"], pairs["decoded"])


def _agents(run: Run) -> tuple[list[ReturnRow], list[AgentClip]]:
    path = run.evaluation_path / "agent.json"
    if not path.exists():
        return [], []
    fps, clips = float(read_json(path)["fps"]), []
    rows = agent_rows(run)
    for key in MOST_CLIPS:
        row = next((r for r in rows if key == (r.role if r.mode is None else f"{r.role} {r.mode}")), None)
        videos = read_clips(run.evaluation_path / "agent_clips.safetensors", key)
        if row and videos:
            label = row.label if row.mode is None else f"{row.label}, {row.mode}"
            clips.append(AgentClip(label, videos["0"].numpy(), fps))
    return rows, clips


def _chart(run: Run, title: str, name: str, keys: Curves, options: dict[str, Any]) -> Chart | None:
    """A chart of those keys that the run has logged; None if it has none."""
    path = _metrics(run, name)
    if path is None:
        return None
    found = read_metrics(path)
    known = {key: label for key, label in keys.items() if key in found}
    return metrics_chart(title, path, known, **options) if known else None


def _action_gap(run: Run) -> Chart | None:
    return _chart(
        run,
        "Do actions matter?",
        "phase1",
        {"val_action_gap_db": "true action above another one"},
        {
            "y_label": "dB",
            "caption": "Error of the next latents predicted from noise with another action, over the error with the true one. "
            "0 dB: the model ignores actions.",
        },
    )


def _metrics(run: Run, name: str) -> Path | None:
    path = run.path / name / "metrics.jsonl"
    return path if path.exists() else None
