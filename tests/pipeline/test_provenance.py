"""Where a run comes from is written down before anything is made: a run that is killed at once still tells it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dreamer
from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.data.pretokenize import GroupMaker
from dreamer.pipeline import run as run_module
from dreamer.pipeline.run import git_revision
from dreamer.pipeline.runs import compare
from dreamer.training import record
from dreamer.training.loop import Trainer
from dreamer.yaml_config import load_config

REVISION = "0123456789abcdef+changes"


def killed(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def at_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "git_revision", lambda: REVISION)


def check_record(run: Path, command: str) -> None:
    assert load_config(DreamerConfig, run / "config.yaml").run_dir == run
    told = json.loads((run / "evaluation" / "run.json").read_text())
    assert told["command"] == command and told["revisions"][-1] == REVISION
    assert told["versions"]["torch"] == torch.__version__ and " core" in told["hardware"]["CPU"]
    assert told["hardware"]["dreamer"] == dreamer.__version__


def test_recording(at_revision: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(record, "play_episode", killed)
    monkeypatch.setattr(run_module.Run, "write_spent", lambda *_: None)  # a kill, unlike Ctrl-C, leaves no time for it
    assert main(["record", "--preset", "smoke", f"run_dir={run}"]) == 130
    check_record(run, f"dreamer record --preset smoke run_dir={run}")
    (entry,) = compare([tmp_path]).entries
    assert not entry.problem and entry.columns["revision"] == "0123456+"


@pytest.mark.parametrize("phase", ["tokenizer", "phase1", "phase2", "phase3", "bc_long"])
def test_training(at_revision: None, smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Of a run whose earlier stages were made by others, without a record; and no second one where nothing is left to do."""
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run, ignore=shutil.ignore_patterns("evaluation", "config.yaml", "tensorboard", "media", "report.html"))
    words = ["train", phase, "--preset", "smoke", f"run_dir={run}"]
    assert main(words) == 0 and not (run / "evaluation").exists()
    shutil.rmtree(run / phase)
    monkeypatch.setattr(Trainer, "train_step", killed)
    monkeypatch.setattr(run_module.Run, "write_spent", lambda *_: None)
    assert main(words) == 130
    check_record(run, f"dreamer train {phase} --preset smoke run_dir={run}")


def test_pretokenizing_in_a_run(at_revision: None, smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for name in ("episodes", "tokenizer"):
        shutil.copytree(smoke_run / name, run / name)
    shutil.copy(smoke_run / "config.yaml", run / "config.yaml")
    monkeypatch.setattr(GroupMaker, "make", killed)
    monkeypatch.setattr(run_module.Run, "write_spent", lambda *_: None)
    assert main(["pretokenize", "--preset", "smoke", f"run_dir={run}"]) == 130
    assert json.loads((run / "evaluation" / "run.json").read_text())["revisions"] == [REVISION]


def test_pretokenizing_without_a_run(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pretokenize_dataset.py`` is this verb. All revisions that had a part in it are kept."""
    words = ["pretokenize", "--data-path", str(smoke_run / "episodes"), "--output-path", str(tmp_path / "out")]
    words += ["--tokenizer", str(smoke_run / "tokenizer"), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "git_revision", lambda: "first")
        patch.setattr(GroupMaker, "make", killed)
        assert main(words) == 130
    monkeypatch.setattr(run_module, "git_revision", lambda: "second")
    assert main(words) == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert told["command"] == f"dreamer {' '.join(words)}" and told["revisions"] == ["first", "second"]
    assert told["versions"]["numpy"] == np.__version__ and told["hardware"]["PyTorch"] == torch.__version__
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert main([*words, "--dtype", "float16"]) == 0  # nothing left to do: who made it stays
    assert (tmp_path / "out" / "run.json").read_bytes() == before


def test_a_checkpoint_alone(smoke_run: Path) -> None:
    for phase in ("tokenizer", "phase1", "phase3"):
        newest = sorted((smoke_run / phase / "checkpoints").iterdir())[-1]
        told = json.loads((newest / "model.json").read_text())["made_with"]
        assert told["versions"]["torch"] == torch.__version__ and told["hardware"]["threads"] == "1"
        assert told["revisions"] == [git_revision()] and json.loads((newest / "state.json").read_text())["settings"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_changes_that_are_not_committed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "dreamer"
    (package / "pipeline").mkdir(parents=True)
    for file in (package / "__init__.py", package / "pipeline" / "run.py"):
        file.write_text("")
    monkeypatch.setattr(run_module, "__file__", str(package / "pipeline" / "run.py"))
    revision: Callable[[], str | None] = git_revision.__wrapped__
    assert revision() is None

    def git(*words: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *author, *words], cwd=package, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert revision() is None  # no commit, and no file of the package in it
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert revision() == head
    (package / "new.py").write_text("")
    assert revision() == f"{head}+changes"
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("x = 1\n")
    assert revision() == f"{head}+changes"
