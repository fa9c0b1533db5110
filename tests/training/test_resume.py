"""Every phase, interrupted anywhere, ends with the same bytes as without the interruption."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamer.interrupt import Interrupted
from dreamer.pipeline import STAGES, Run
from dreamer.training import loop
from dreamer.training.loop import Trainer

BEFORE = {
    "tokenizer": (),
    "phase1": ("tokenizer", "pretokenize"),
    "phase2": ("tokenizer", "pretokenize", "phase1"),
    "bc_long": ("tokenizer", "pretokenize", "phase1", "phase2"),
    "phase3": ("tokenizer", "pretokenize", "phase1", "phase2"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def whole(trained: Path, make_run: Callable[..., Run]) -> Path:
    """A run without an interruption."""
    path = trained / "run"
    if not path.exists():
        run = make_run(path)
        for stage in ("tokenizer", "pretokenize", "phase1", "phase2", "bc_long", "phase3"):
            assert STAGES[stage](run)
    return path


def contents(path: Path) -> dict[str, bytes]:
    found = [p for p in path.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def assert_same_contents(path: Path, whole: Path) -> None:
    expected, got = contents(whole), contents(path)
    assert expected.keys() == got.keys()
    assert [name for name in expected if expected[name] != got[name]] == []


def run_before(phase: str, run: Run, whole: Path) -> Run:
    """``run`` with what ``phase`` needs, from the whole one."""
    for stage in BEFORE[phase]:
        name = {"pretokenize": "latents"}.get(stage, stage)
        shutil.copytree(whole / name, run.path / name)
    return run


@pytest.mark.parametrize("stop_at", [4])
@pytest.mark.parametrize("phase", list(BEFORE))
def test_an_interrupted_phase_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, phase: str, stop_at: int
) -> None:
    run = run_before(phase, make_run(tmp_path / "run"), whole)
    train_step = Trainer.train_step

    def interrupted(self: Trainer, batches: list) -> dict:
        if self.step == stop_at:
            raise KeyboardInterrupt
        return train_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", interrupted)
        STAGES[phase](run)
    assert STAGES[phase](run)
    assert_same_contents(run.path / phase, whole / phase)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_number_of_workers_changes_no_byte(whole: Path, tmp_path: Path, make_run: Callable[..., Run], num_workers: int) -> None:
    run = make_run(tmp_path / "run", data={"num_workers": num_workers})
    for stage in ("tokenizer", "pretokenize", "phase1", "phase2", "bc_long", "phase3"):
        assert STAGES[stage](run)
    for phase in BEFORE:
        assert contents(run.path / phase) == contents(whole / phase), phase


@pytest.mark.parametrize("phase", list(BEFORE))
def test_a_phase_that_is_stopped_after_every_single_step_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    run = run_before(phase, make_run(tmp_path / "run"), whole)
    train_step = Trainer.train_step

    def stopped(self: Trainer, batches: list) -> dict:
        signal.raise_signal(signal.SIGTERM)
        return train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    count, is_done = 0, False
    while not is_done:
        try:
            is_done = not STAGES[phase](run)
        except Interrupted as interruption:
            count += 1
            assert interruption.signum == signal.SIGTERM
    assert count == 7
    assert_same_contents(run.path / phase, whole / phase)


def test_another_seed_gives_other_weights(whole: Path, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", seed=1)
    STAGES["tokenizer"](run)
    name = "checkpoints/step_00000007/model.safetensors"
    assert contents(run.path / "tokenizer")[name] != contents(whole / "tokenizer")[name]


def test_a_phase_does_not_start_from_an_unfinished_one(whole: Path, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run")
    for name in ("tokenizer", "latents", "phase1"):
        shutil.copytree(whole / name, run.path / name)
    shutil.rmtree(run.path / "phase1" / "checkpoints" / "step_00000007")
    with pytest.raises(ValueError, match=r"phase1: is at step 6 of 7; run again to finish it: dreamer train phase1"):
        STAGES["phase2"](run)
    with pytest.raises(ValueError, match="phase2: holds no checkpoint; run first: dreamer train phase2"):
        STAGES["phase3"](run)


def test_a_phase_is_not_resumed_from_other_initial_weights(whole: Path, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run")
    for name in ("tokenizer", "latents", "phase1", "phase2"):
        shutil.copytree(whole / name, run.path / name)
    shutil.rmtree(run.path / "phase1" / "checkpoints")
    shutil.copytree(whole / "phase2" / "checkpoints", run.path / "phase1" / "checkpoints")
    with pytest.raises(ValueError, match="initial_weights"):
        STAGES["phase2"](run)


def test_a_step_that_takes_too_long_is_given_up_and_that_is_said(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(loop, "PATIENCE", 0.2)

    def slow(self: Trainer, batches: list) -> dict:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
        return {}

    monkeypatch.setattr(Trainer, "train_step", slow)
    with pytest.raises(Interrupted):
        STAGES["tokenizer"](run)
    assert "step 1 took over 0.2 seconds and was given up; there is no checkpoint yet" in caplog.text
