"""What goes wrong with the machine or the numbers while a phase trains: it ends with a clear message, and nothing saved before is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamer.cli import main
from dreamer.data.files import locked
from dreamer.losses import LossNormalizer
from dreamer.pipeline import STAGES, Run
from dreamer.training import checkpoint
from dreamer.training.checkpoint import newest_checkpoint
from dreamer.training.logging import RunLogger
from dreamer.training.loop import MAX_BAD_STEPS, Phase, TrainConfig, Trainer, TrainingDiverged
from dreamer.training.optim import optimizer_tensors
from dreamer.training.phase0 import Phase0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 6 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux to mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Use up the disk but for so many bytes (a multiple of the page size)."""
    file = disk / "filled"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    file.write_bytes(bytes(free - leave))
    return file


class Rows:
    def to(self, device: Any) -> Rows:
        return self


class Wide(Phase):
    """100 kB of weights; the loss or the gradient may turn bad at some steps."""

    def __init__(self, bad_loss: tuple[int, ...] = (), bad_gradient: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(250, 100)
        self.bad_loss, self.bad_gradient = bad_loss, bad_gradient
        self.normalizer = LossNormalizer(("square",))

    def forward(self, batch: Rows, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.normalizer("square", self.model(torch.randn(2, 250, generator=generator)).square().mean())
        if step in self.bad_loss:
            loss = loss * float("inf")
        if step in self.bad_gradient:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, {}


class Stream:
    def __next__(self) -> Rows:
        return Rows()

    def close(self) -> None:
        pass


def trainer(folder: Path, phase: Wide | None = None, **changes: Any) -> Trainer:
    config = TrainConfig.model_validate({"steps": 8, "log_every": 1, "checkpoint_every": 2} | changes)
    return Trainer(phase or Wide(), config, folder / "toy", seed=0, settings={}, model_info={})


def train(folder: Path, phase: Wide | None = None, validate: Any = None, **changes: Any) -> Trainer:
    made = trainer(folder, phase, **changes)
    made.run(lambda start: Stream(), validate)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    found = [p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    train(tmp_path / "whole")
    return contents(tmp_path / "whole" / "toy")


def saved(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder / "toy" / "checkpoints").items()}


@pytest.mark.parametrize("leave", [0, 4096, 30 * 4096, 100 * 4096])
@pytest.mark.parametrize("is_foreseen", [True, False], ids=["foreseen", "while writing"])
def test_a_full_disk_costs_no_checkpoint(
    disk: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, leave: int, is_foreseen: bool
) -> None:
    train(disk, steps=4)
    state = disk / "toy" / "checkpoints"
    before = saved(disk)
    file = fill(disk, leave)
    continued = trainer(disk, steps=4)
    with monkeypatch.context() as patch:
        if not is_foreseen:  # as if another process had filled the disk a moment later
            patch.setattr(checkpoint.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**12))
        continued.step = 5
        with pytest.raises(OSError, match=r"was not written \(.*\); older ones are as they were: free some space") as caught:
            continued.save()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(state / "step_00000005")
    assert saved(disk) == before and [p.name for p in state.iterdir() if p.name.startswith(".")] == []
    file.unlink()
    assert newest_checkpoint(disk / "toy") == (4, state / "step_00000004")


def test_a_disk_that_fills_up_while_training_ends_it_and_it_goes_on_exactly(disk: Path, whole: dict[str, bytes]) -> None:
    files: list[Path] = []

    def validate(logger: RunLogger, step: int) -> dict[str, float]:
        if not files:
            files.append(fill(disk))
        return {}

    with pytest.raises(OSError) as caught:
        train(disk, validate=validate, validate_every=5)
    assert caught.value.errno == errno.ENOSPC and str(disk / "toy") in str(caught.value.filename)
    assert newest_checkpoint(disk / "toy") == (4, disk / "toy" / "checkpoints" / "step_00000004")
    files[0].unlink()
    train(disk, validate_every=5)
    assert contents(disk / "toy").keys() == whole.keys()
    assert [name for name, data in contents(disk / "toy").items() if data != whole[name]] == []


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_row_of_metrics_that_does_not_fit_names_the_file_and_is_written_again(disk: Path, room: int) -> None:
    with RunLogger(disk, "toy", total_steps=3000, tensorboard=False) as logger:
        logger.log(1, {"loss": 0.5})
        filled = fill(disk)
        with pytest.raises(OSError) as caught:
            for step in range(2, 1000):
                logger.log(step, {"loss": 0.5})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(disk / "metrics.jsonl")
    filled.unlink()
    with RunLogger(disk, "toy", total_steps=3000, resume_step=1, tensorboard=False) as logger:
        logger.log(2, {"loss": 0.25})
    assert (disk / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_a_read_only_folder_is_named_and_stays_as_it_is(disk: Path) -> None:
    train(disk, steps=4)
    before = contents(disk / "toy")
    continued = trainer(disk, steps=4)
    continued.step = 5
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        with pytest.raises(OSError, match=r"not written \(Read-only file system\); older ones are as they were: mend that") as caught:
            continued.save()
        assert caught.value.errno == errno.EROFS and str(disk) in str(caught.value.filename)
        with pytest.raises(OSError) as caught:
            train(disk, steps=8)
        assert caught.value.errno == errno.EROFS and str(disk) in str(caught.value.filename)
        assert train(disk, steps=4).step == 4  # a finished one has nothing to write
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert contents(disk / "toy") == before


def test_the_command_ends_with_one_line(
    disk: Path, make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(disk / "run")
    run.save_config()
    command = ["train", "tokenizer", "--config", str(run.config_path)]
    filled = fill(disk, 400_000 // 4096 * 4096)
    assert main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"dreamer: error: {disk}") and "free some space and run again" in line
    filled.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Phase0, "forward", lambda self, *_: (next(iter(self.model.parameters())).sum() * torch.nan, {}))
        changed = [*command, "phase0.train.steps=20", f"run_dir={disk / 'other'}"]
        assert main(changed) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"not finite {MAX_BAD_STEPS} steps in a row" in line and "The last checkpoint is intact" in line
    assert main(command) == 0 and STAGES["tokenizer"](run) is False


def test_two_trainings_in_one_folder_do_not_meet(tmp_path: Path, make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    run.save_config()
    command, folder = ["train", "tokenizer", "--config", str(run.config_path)], run.path / "tokenizer"
    half = folder / "checkpoints" / ".writing_step_00000002_1"  # what the other is writing
    half.mkdir(parents=True)
    words = "import pathlib, sys; from dreamer.data.files import locked\nwith locked(pathlib.Path(sys.argv[1])): print('held'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", words, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert main(command) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"dreamer: error: {folder}: another process is at work here") and line.endswith("or use another folder")
        assert half.is_dir() and newest_checkpoint(folder) is None
    finally:
        other.kill()  # as a machine that fails: nothing is left locked
        other.communicate()
    assert main(command) == 0 and not half.exists() and newest_checkpoint(folder) is not None
    assert main(command) == 0  # let go at the end


def test_another_users_lock_is_respected() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with tempfile.TemporaryDirectory() as name:  # where others may go, unlike pytest's
        os.chmod(name, 0o777)
        with locked(Path(name)):
            os.chmod(Path(name) / ".lock", 0o644)
            os.seteuid(65534)
            try:
                with pytest.raises(ValueError, match="another process is at work here"), locked(Path(name)):
                    pass
            finally:
                os.seteuid(0)


def test_a_file_system_without_locks_is_told_of_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    with locked(tmp_path):
        assert f"{tmp_path}: no lock here (No locks available)" in caplog.text


@pytest.mark.parametrize("kind", ["bad_loss", "bad_gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    made = trainer(tmp_path, Wide(**{kind: (3,)}))
    states = []
    for _ in range(5):
        metrics = made.train_step([Rows()])
        made.step += 1
        tensors = {**made.phase.state_dict(), **{f"ema.{n}": t for n, t in made.ema.items()}, **optimizer_tensors(made.optimizers)}
        states.append(({name: t.detach().clone() for name, t in tensors.items()}, metrics["skipped_steps"]))
    same = [all(torch.equal(one[0][name], other[0][name]) for name in one[0]) for one, other in zip(states, states[1:], strict=False)]
    assert same == [False, False, True, False] and [skipped for _, skipped in states] == [0, 0, 0, 1, 1]
    assert all(p.isfinite().all() for p in made.parameters.values())


def test_bad_steps_in_a_row_are_counted_across_an_interruption(tmp_path: Path) -> None:
    phase = Wide(bad_loss=tuple(range(2, 100)))
    made = trainer(tmp_path, phase, steps=50)
    for _ in range(2 + MAX_BAD_STEPS - 1):
        made.train_step([Rows()])
        made.step += 1
    made.save(is_interim=True)
    again = trainer(tmp_path, phase, steps=50)
    assert (again.step, again.num_skipped) == (made.step, MAX_BAD_STEPS - 1)
    with pytest.raises(TrainingDiverged, match=f"not finite {MAX_BAD_STEPS} steps in a row"):
        again.train_step([Rows()])
