"""``dreamer doctor``: each thing is tried, and what is missing is named with the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.pipeline import doctor
from dreamer.pipeline.doctor import Diagnosis, diagnose, matrix_rate


def found(diagnosis: Diagnosis, name: str) -> tuple[bool, str]:
    (finding,) = [f for f in diagnosis.findings if f.name.startswith(name)]
    return finding.holds, finding.text


def config(tmp_path: Path, **settings: Any) -> DreamerConfig:
    return DreamerConfig.model_validate({"run_dir": tmp_path / "runs" / "new", "env": {"name": "crafter-chop"}, **settings})


def test_this_machine_runs_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"run_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in out and "GFLOP/s in fp32" in out and f"GB free at {tmp_path}" in out
    assert out.partition("What runs here\n")[2].startswith("yes  the demo") and not list(tmp_path.iterdir())


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no java, no xvfb-run
    monkeypatch.setattr(doctor.torch, "__version__", "2.10.1+cpu")
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 1e18)
    settings = config(tmp_path, env={"name": "minestudio"}, cosmos_tokenizer={"checkpoint_path": tmp_path / "weights"})
    diagnosis = diagnose(settings)
    demo_runs, why = found(diagnosis, "the demo")
    assert not demo_runs and not diagnosis.is_well
    for said in ("PyTorch is 2.10.1+cpu; expected at least 2.11", "choose another run_dir", "minestudio"):
        assert said in why
    assert found(diagnosis, "the Cosmos tokenizer")[0] is False and "hf download" in found(diagnosis, "the Cosmos tokenizer")[1]
    runs, why = found(diagnosis, "MineRL")
    assert not runs and "minerl" in why and "Java 8" in why
    assert diagnosis.text().count("\n") == 3 + len(diagnosis.facts) + len(diagnosis.findings) - 1


def test_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else True)
    runs, why = found(diagnose(config(tmp_path)), "dreamer play")
    assert not runs and why == "uvicorn not installed: pip install 'dreamer4[play]'"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    runs, why = found(diagnose(config(tmp_path)), "the demo")
    assert not runs and "cannot be written to" in why


@pytest.mark.gpu
def test_a_gpu() -> None:
    assert found(diagnose(DreamerConfig()), "training on a GPU")[0]
    assert matrix_rate(torch.bfloat16, torch.device("cuda")) > matrix_rate(torch.float32, torch.device("cpu"))
