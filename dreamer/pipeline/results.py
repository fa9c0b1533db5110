"""Several finished runs that differ in their seed, taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamer.config import DreamerConfig
from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.pooled import Figure, pool_returns, pool_world_models
from dreamer.evaluation.video import WorldModelResult
from dreamer.pipeline.run_files import AgentFile, RunFile, WorldModelFile, read_file
from dreamer.pipeline.targets import Check, check_targets
from dreamer.yaml_config import load_config

MAY_DIFFER = ("seed", "run_dir")


@dataclass(frozen=True)
class Finished:
    """What a finished run's folder says about it."""

    path: Path
    config: DreamerConfig
    world_model: WorldModelResult
    training: WorldModelResult | None  # the same of training episodes, where they were scored
    agents: dict[str, AgentResult]  # by player, such as "agent sampled"; empty without an environment
    labels: dict[str, str]  # of the players, for people
    spent: dict[str, Any]

    @property
    def seconds(self) -> dict[str, float]:
        return {stage: float(spent["seconds"]) for stage, spent in self.spent["stages"].items()}

    @property
    def peak_memory_mb(self) -> float:
        return max(float(spent["peak_memory_mb"]) for spent in self.spent["stages"].values())


@dataclass(frozen=True)
class Results:
    """Everything that the page shows."""

    command: str
    runs: tuple[Finished, ...]
    figures: dict[str, dict[str, Figure]]  # psnr, ssim, psnr_gap, the same with training_, returns, success, way, differences: by name
    checks: tuple[Check, ...]  # none without an environment

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        first = self.runs[0]
        evaluated = next(iter(first.agents.values()), None)
        return {
            "command": self.command,
            "seeds": self.seeds,
            "checks": [check.to_json() for check in self.checks],
            "protocol": {
                "context": first.world_model.context,
                "horizon": first.world_model.horizon,
                "windows_a_run": [run.world_model.num_windows for run in self.runs],
                "held_out_episodes_a_run": [run.world_model.num_episodes for run in self.runs],
                "played_episodes_a_run": len(evaluated.returns) if evaluated else 0,
                "intervals": "95 % percentile bootstrap over episodes; pooled: over those of all runs, without an interval where they "
                "are the same; sd: over runs, n - 1",
            },
            "labels": first.labels,
            "figures": {kind: {name: figure.to_json() for name, figure in group.items()} for kind, group in self.figures.items()},
            "runs": [
                {
                    "run_dir": str(run.path),
                    "seed": run.config.seed,
                    "seconds": run.seconds,
                    "total_seconds": sum(run.seconds.values()),
                    "peak_memory_mb": run.peak_memory_mb,
                    **{key: run.spent.get(key) for key in ("command", "hardware", "versions", "revisions")},
                }
                for run in self.runs
            ],
        }


def collect_results(paths: Sequence[Path], command: str = "") -> Results:
    """The figures of the runs in these folders, and, where there is an environment, whether they keep the demo's promises.

    Raises ``ValueError`` for no runs, runs that are not finished, that share a seed, or that differ in more than the seed.
    """
    if not paths:
        raise ValueError("no runs to take together; give the folder of at least one finished run")
    runs = tuple(read_finished(path) for path in paths)
    _check_comparable(runs)
    own_episodes = runs[0].config.data.recordings is None  # each run has recorded its own
    figures = pool_world_models([run.world_model for run in runs], own_episodes)
    training = [run.training for run in runs if run.training is not None]
    if len(training) == len(runs):
        figures |= {f"training_{kind}": group for kind, group in pool_world_models(training, own_episodes).items()}
    if all(run.agents for run in runs):
        figures |= pool_returns([run.agents for run in runs])
    if runs[0].config.env is None:
        return Results(command, runs, figures, ())
    machines = [f"{run.spent['hardware']['CPU']}, {run.spent['hardware']['threads']} threads" for run in runs]
    checks = check_targets(figures, [sum(run.seconds.values()) for run in runs], [run.peak_memory_mb for run in runs], machines)
    return Results(command, runs, figures, tuple(checks))


def read_finished(path: Path) -> Finished:
    """A run whose stages are all done; ``ValueError`` names what is missing or damaged, and how to come by it."""
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path}: is not the folder of a run (it has no config.yaml); expected one that dreamer demo has made")
    config = load_config(DreamerConfig, path / "config.yaml")
    evaluation = path / "evaluation"
    needed = {evaluation / "world_model.json": "evaluate world-model", evaluation / "run.json": "demo", path / "report.html": "report"}
    if config.env is not None:
        needed[evaluation / "agent.json"] = "evaluate agent"
    for file, verb in needed.items():
        if not file.is_file():
            raise ValueError(f"{file}: does not exist; this run is not finished, run: dreamer {verb} --config {path / 'config.yaml'}")
    remove, again = "remove it and run: dreamer evaluate", f"--config {path / 'config.yaml'}"
    rows = read_file(evaluation / "agent.json", AgentFile, f"{remove} agent {again}").rows if config.env is not None else []
    keys = [row.role if row.mode is None else f"{row.role} {row.mode}" for row in rows]
    labels = [row.label if row.mode is None else f"{row.label}, {row.mode}" for row in rows]
    spent = read_file(evaluation / "run.json", RunFile, "restore it, or make the run again elsewhere: times are measured only once")
    dreams = read_file(evaluation / "world_model.json", WorldModelFile, f"{remove} world-model {again}")
    return Finished(
        path=path,
        config=config,
        world_model=dreams.result,
        training=dreams.training,
        agents={key: row.result for key, row in zip(keys, rows, strict=True)},
        labels=dict(zip(keys, labels, strict=True)),
        spent=spent.model_dump(exclude_unset=True),
    )


def _check_comparable(runs: Sequence[Finished]) -> None:
    first = runs[0]
    seen: dict[int, Path] = {}
    for run in runs:
        if run.config.seed in seen:
            other = seen[run.config.seed]
            raise ValueError(f"{run.path}: has the seed {run.config.seed}, as {other} has; expected runs of different seeds")
        seen[run.config.seed] = run.path
        if key := _difference(first.config.model_dump(mode="json"), run.config.model_dump(mode="json")):
            raise ValueError(f"{run.path}: differs from {first.path} in {key}; expected runs that differ in their seed alone")


def _difference(a: Any, b: Any, key: str = "") -> str | None:
    """The dotted key of the first value that differs, but for those that may."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in sorted(a.keys() | b.keys()) if key or k not in MAY_DIFFER]
        found = (_difference(a.get(k), b.get(k), f"{key}.{k}" if key else k) for k in keys)
        return next((k for k in found if k), None)
    return key if a != b else None
