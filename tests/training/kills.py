"""Kills real processes of a run, again and again, and compares what they end with, byte for byte, with a run that nobody disturbed.

    python tests/training/kills.py --kills 120 --seed 0        (make kill)
    python tests/training/kills.py --signals                   (SIGTERM and SIGINT in their place)

Every attempt is a process of its own (forked, so that PyTorch is imported once). It ends itself by SIGKILL at the n-th moment of a kind:
before a training step or an episode, in a validation, while it resumes, at a call that opens, syncs, renames or removes a file; or somebody
else ends it after a random time. Then the next attempt goes on, and may be killed as well. Prints a summary as JSON; exit code 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dreamer import cli
from dreamer.config import DreamerConfig
from dreamer.data import EpisodeStore, pretokenize
from dreamer.pipeline import STAGES, Run
from dreamer.training import checkpoint, loop, record
from dreamer.yaml_config import save_config

STAGE_FOLDERS = {
    "record": "episodes",
    "tokenizer": "tokenizer",
    "pretokenize": "latents",
    "phase1": "phase1",
    "phase2": "phase2",
    "phase3": "phase3",
    "bc_long": "bc_long",
    "evaluate world-model": "evaluation",
    "evaluate agent": "evaluation",
}
RESULTS = {"evaluate world-model": "world_model", "evaluate agent": "agent"}  # how the names of a stage's files begin in a shared folder
KINDS = ("step", "episode", "validation", "resume", "checkpoint", "metrics", "file", "time")
AUDITED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


PROMISED_SECONDS = 20  # from a signal to the end


class Moment(NamedTuple):
    """When a signal comes: at the n-th moment of a kind, or ("time") after so many seconds."""

    kind: str
    number: float
    signals: tuple[int, ...] = (signal.SIGKILL,)
    pause: float = 0.0  # between two signals


def settings(run_dir: Path) -> DreamerConfig:
    """Every stage in about a second; recordings and latents in two shards."""
    small = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2, "context_length": 6, "mlp_ratio": 1}
    flat = small | {"num_layers": 1, "time_every": 0}
    train = {"steps": 7, "batch_size": 4, "log_every": 2, "validate_every": 3, "checkpoint_every": 3}
    train["optim"] = {"warmup_steps": 2, "learning_rate": 1e-3, "optimizer": "muon"}
    imagination = {"updates_per_rollout": 2, "rollout": {"horizon": 3, "context": 2, "sampler": {"num_steps": 2}}}
    values: dict[str, Any] = {
        "run_dir": run_dir,
        "device": "cpu",
        "threads": 1,
        "env": {"name": "crafter-chop", "options": {"camera": "arena", "border": False, "tree_fraction": 0.25, "length": 10}},
        "record": {"num_episodes": 40},
        "data": {"val_fraction": 0.2, "num_val_batches": 1},
        "tokenizer": {"patch_size": 16, "token_grid": (2, 2), "latent_channels": 4, "encoder": flat, "decoder": flat},
        "agent": {
            "dynamics": {"transformer": small | {"dropout": 0.1}, "num_registers": 1, "max_steps": 4},
            "heads": {"hidden": 16, "num_distances": 2, "num_bins": 11, "bin_range": 3.0},
        },
        "phase0": {"train": train | {"keep_best": {"metric": "val_psnr", "better": "higher"}}, "normalization_frames": 32},
        "phase1": {"train": train, "sequence_length": 5, "long_sequence_length": 8, "long_every": 3},
        "phase2": {"train": train | {"accumulate": 2}, "sequence_length": 5, "long_sequence_length": 8, "long_every": 2},
        "phase3": {"train": train | {"checkpoint_every": 2}, "imagination": imagination},
        "bc_long": {"extra_steps": 7},
        "evaluation": {
            "sampler": {"num_steps": 2},
            "world_model": {"context": 2, "horizon": 3, "num_windows": 4, "num_clips": 1},
            "agent": {"num_episodes": 2, "num_envs": 2, "num_clips": 1},
        },
    }
    return DreamerConfig.model_validate(values)


# ---- in the process that is ended -------------------------------------------------------------------------------------------


class Watch:
    """Counts the moments of each kind, and sends the signals when theirs has come."""

    def __init__(self, run_dir: Path, moment: Moment | None) -> None:
        self.root, self.moment, self.counts = str(run_dir), moment, Counter[str]()

    def __call__(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.moment and self.moment.kind == kind and self.counts[kind] == self.moment.number:
            for place, signum in enumerate(self.moment.signals):
                time.sleep(self.moment.pause if place else 0)
                os.kill(os.getpid(), signum)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in AUDITED or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.fspath(arguments[0])
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(path).startswith(self.root) and "tensorboard" not in path:
            self("checkpoint" if "/checkpoints" in path else "metrics" if "metrics.jsonl" in path else "file")

    def install(self) -> None:
        sys.addaudithook(self.audit)

        def around(holder: Any, name: str, kind: str, also_after: bool = False) -> None:
            inner = getattr(holder, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                self(kind)
                result = inner(*arguments, **options)
                if also_after:
                    self(kind)
                return result

            setattr(holder, name, watched)

        around(loop.Trainer, "train_step", "step")
        around(loop.Trainer, "_resume", "resume", also_after=True)
        around(loop, "read_tensors", "resume")
        around(record, "play_episode", "episode")
        around(sys.modules[pretokenize.__module__], "_episode", "episode")
        around(checkpoint, "save_file", "checkpoint", also_after=True)
        around(os, "fsync", "file")
        inner = loop.Trainer._validate

        def validated(trainer: Any, metrics: Any, logger: Any, validate: Callable[..., Any], stop: Any) -> Any:
            def hook(*arguments: Any) -> Any:
                self("validation")
                found = validate(*arguments)
                self("validation")
                return found

            return inner(trainer, metrics, logger, hook, stop)

        loop.Trainer._validate = validated


def attempt(run_dir: Path, work: Callable[[], int], moment: Moment | None) -> tuple[int, Counter[str], str]:
    """``work`` in a process of its own: how it ended (as ``Popen.returncode``), how many moments of each kind it saw, what it said."""
    report, said = run_dir.with_suffix(".counts"), run_dir.with_suffix(".said")
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 70
        try:
            log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            watch = Watch(run_dir, moment)
            watch.install()
            code = work()
            report.write_text(json.dumps(watch.counts))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if moment and moment.kind == "time":
        for place, signum in enumerate(moment.signals):
            time.sleep(moment.pause if place else moment.number)
            os.kill(child, signum)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, Counter(json.loads(report.read_text())) if report.exists() else Counter(), said.read_text()


def stage_of(run_dir: Path, stage: str) -> Callable[[], int]:
    def work() -> int:
        STAGES[stage](Run(settings(run_dir)))
        return 0

    return work


# ---- in the one that looks on -----------------------------------------------------------------------------------------------


class Whole(NamedTuple):
    path: Path
    counts: dict[str, Counter[str]]
    seconds: dict[str, float]


def contents(path: Path, beginning: str) -> dict[str, bytes]:
    """All but what holds times; and but unfinished files, which nothing reads and the next hour removes."""
    files = [p for p in path.rglob("*") if p.is_file() and p.name.startswith(beginning)]
    found = [p for p in files if "tensorboard" not in p.parts and not p.name.startswith(".")]
    return {str(p.relative_to(path)): _of_any_revision(p) for p in found}


def _of_any_revision(file: Path) -> bytes:
    """Its bytes, but for the git revision that made it: somebody may commit while this runs for an hour."""
    if file.name not in ("model.json", "manifest.json"):
        return file.read_bytes()
    told = json.loads(file.read_text())
    told.pop("made_with", None)
    told.get("files", {}).pop("model.json", None)
    return json.dumps(told).encode()


def differences(expected: Path, got: Path, stage: str) -> list[str]:
    """The files of ``stage`` that are not the same in two runs."""
    one, other = (contents(run / STAGE_FOLDERS[stage], RESULTS.get(stage, "")) for run in (expected, got))
    if not one:
        raise SystemExit(f"{stage}: made no files in {expected}")
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def undisturbed(base: Path) -> Whole:
    whole = Whole(base / "whole", {}, {})
    for stage in STAGE_FOLDERS:
        began = time.monotonic()
        code, counts, said = attempt(whole.path, stage_of(whole.path, stage), None)
        if code:
            raise SystemExit(f"{stage} failed without a kill:\n{said}")
        whole.counts[stage], whole.seconds[stage] = counts, time.monotonic() - began
    return whole


def prepared(whole: Whole, path: Path, stage: str) -> Path:
    """A run that has all before ``stage`` behind it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for earlier in STAGE_FOLDERS:
        if earlier == stage:
            break
        if earlier not in RESULTS:
            (path / STAGE_FOLDERS[earlier]).symlink_to(whole.path / STAGE_FOLDERS[earlier])
    save_config(settings(path), path / "config.yaml")
    return path


def killed(whole: Whole, path: Path, stage: str, rng: np.random.Generator, num_kills: int) -> tuple[Counter[str], list[str]]:
    """Kill ``stage`` so often; whenever an attempt gets to its end all the same, compare and begin anew. Kinds of the kills, and what went
    wrong."""
    kills, problems = Counter[str](), []
    counts = whole.counts[stage]
    kinds = [kind for kind in KINDS if kind == "time" or counts[kind]]
    first = list(STAGE_FOLDERS).index(stage)  # with few kills, another kind first in each stage
    while True:
        prepared(whole, path, stage)
        is_done = False
        while not is_done:
            moment = None
            if kills.total() < num_kills:
                kind = kinds[(first + kills.total()) % len(kinds)]
                # the later attempts of a run have less to do: early moments are likelier to be reached
                number = whole.seconds[stage] * rng.uniform(0, 1.1) if kind == "time" else 1 + int(counts[kind] * rng.beta(1, 1.5))
                moment = Moment(kind, number)
            code, _, said = attempt(path, stage_of(path, stage), moment)
            if code == -signal.SIGKILL and moment:
                kills[moment.kind] += 1
            elif code:
                problems.append(f"{stage}: after {dict(kills)} ended with {code}: {said}")
                return kills, problems
            is_done = code == 0
        if found := differences(whole.path, path, stage):
            problems.append(f"{stage}: after {dict(kills)} differs in {found}")
        if kills.total() >= num_kills or problems:
            return kills, problems


def kill_all(base: Path, num_kills: int, seed: int, stages: list[str]) -> dict[str, Any]:
    whole, began = undisturbed(base), time.monotonic()
    shares = [num_kills // len(stages) + (place < num_kills % len(stages)) for place in range(len(stages))]
    by_stage, problems = {}, []
    for stage, share in zip(stages, shares, strict=True):
        kills, found = killed(whole, base / "killed", stage, np.random.default_rng((seed, *stage.encode())), share)
        by_stage[stage] = dict(kills)
        problems += found
    total = sum((Counter(kills) for kills in by_stage.values()), Counter())
    seconds = round(time.monotonic() - began, 1)
    return {"kills": total.total(), "kinds": dict(total), "stages": by_stage, "seconds": seconds, "problems": problems}


def signal_all(base: Path) -> dict[str, Any]:
    """SIGTERM and SIGINT at chosen moments of ``dreamer`` itself: exit code, seconds until it ended, and that going on gives the same."""
    whole = undisturbed(base)
    term, once, twice = (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGINT)
    scenarios = {
        "SIGTERM between steps": ("phase1", Moment("step", 3, term), 143),
        "SIGINT in a step after a checkpoint": ("phase3", Moment("step", 4, once), 130),
        "SIGTERM in a validation": ("phase2", Moment("validation", 1, term), 143),
        "SIGINT in the last validation": ("tokenizer", Moment("validation", 5, once), 130),
        "SIGTERM in a checkpoint": ("phase1", Moment("checkpoint", 9, term), 143),
        "SIGINT twice in a checkpoint": ("phase1", Moment("checkpoint", 9, twice, 0.8), 130),
        "SIGTERM while it resumes": ("phase2", Moment("resume", 1, term), 143),
        "SIGTERM in the demo, in phase 1": ("demo", Moment("step", 9, term), 143),
        "SIGTERM while it records": ("record", Moment("episode", 35, term), 143),
        "SIGINT while it pretokenizes": ("pretokenize", Moment("episode", 5, once), 130),
    }
    results, problems = {}, []
    for name, (stage, moment, expected) in scenarios.items():
        path = prepared(whole, base / "signalled", "record" if stage == "demo" else stage)
        verb = {"record": ["record"], "pretokenize": ["pretokenize"], "demo": ["demo", "--no-open"]}.get(stage, ["train", stage])
        command = [*verb, "--config", str(path / "config.yaml")]
        began = time.monotonic()
        code, _, said = attempt(path, lambda command=command: cli.main(command), moment)
        seconds = time.monotonic() - began
        if seconds > PROMISED_SECONDS:
            problems.append(f"{name}: ended after {seconds:.0f} seconds; promised {PROMISED_SECONDS}")
        stages = list(STAGE_FOLDERS) if stage == "demo" else [stage]
        found = checkpoint.newest_checkpoint(path / STAGE_FOLDERS["phase1" if stage == "demo" else stage])
        results[name] = {"code": code, "seconds": round(seconds, 1), "said": said, "newest": found[1].name if found else None}
        again, _, said = attempt(path, lambda command=command: cli.main(command), None)
        if code != expected or again:
            problems.append(f"{name}: ended with {code}, expected {expected}; then with {again}: {results[name]['said']} {said}")
        elif stage == "record":  # the same episodes; shards may end elsewhere
            one, other = (EpisodeStore(run / "episodes") for run in (whole.path, path))
            if one.fingerprint() != other.fingerprint():
                problems.append(f"{name}: the episodes differ")
        else:
            problems += [f"{name}: differs in {found}" for each in stages if (found := differences(whole.path, path, each))]
    return {"scenarios": results, "problems": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGE_FOLDERS), default=list(STAGE_FOLDERS))
    parser.add_argument("--signals", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        base = Path(folder)
        result = signal_all(base) if arguments.signals else kill_all(base, arguments.kills, arguments.seed, arguments.stages)
    print(json.dumps(result, indent=1))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
