"""Several processes, as torchrun starts them, against one: the same losses, weights, data and checkpoints, whatever their number."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.data import LatentStore
from dreamer.data.files import locked
from dreamer.interrupt import ECHO_OF_SEVERAL, Interrupted, Stop
from dreamer.pipeline import STAGES, Run
from dreamer.training.checkpoint import list_checkpoints, newest_checkpoint, read_state
from dreamer.training.distributed import Parallel, Ranks
from dreamer.training.logging import SilentLogger
from dreamer.training.loop import Trainer
from dreamer.training.models_io import load_agent
from dreamer.training.optim import OptimConfig, make_optimizers
from dreamer.training.sharded_state import read_pieces, saved_shapes
from dreamer.yaml_config import load_config, save_config
from tests.training.ranks_worker import ACCUMULATE, bad_gradient, train

ROOT = Path(__file__).parents[2]
PHASES = ("tokenizer", "phase1", "phase2", "bc_long", "phase3")
BEFORE = {
    "tokenizer": (),
    "phase1": ("tokenizer", "latents"),
    "phase2": ("tokenizer", "latents", "phase1"),
    "bc_long": ("tokenizer", "latents", "phase2"),
    "phase3": ("tokenizer", "latents", "phase2"),
    "skipped": ("tokenizer", "latents", "phase1"),
    "taken": ("tokenizer", "latents"),
}
BATCH = 8  # rows, of which 2 bootstrap, so that of 3 processes one has none of these; every third batch has 5 long ones
TOLERANCE = 1e-5
TRAIN = {"steps": 3, "batch_size": BATCH, "log_every": 1, "validate_every": 3, "checkpoint_every": 2}
TRAIN["optim"] = {"warmup_steps": 1, "learning_rate": 1e-3}  # AdamW; Muon computes in bf16, which makes much of the last bit


def settings() -> dict[str, Any]:
    return {
        "phase0": {"train": TRAIN},
        "phase1": {"train": TRAIN | {"accumulate": 2}},
        "phase2": {"train": TRAIN, "relevant": {"fraction": 0.4}},
        "phase3": {"train": TRAIN},
        "bc_long": {"extra_steps": 3},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def alone(folder: Path, make_run: Callable[..., Run]) -> Run:
    """All phases in one process."""
    run = make_run(folder / "alone", **settings())
    if not run.path.exists():
        for stage in ("tokenizer", "pretokenize", *PHASES[1:]):
            STAGES[stage](run)
        save_config(run.config, folder / "config.yaml")
    return run


def command(processes: int, *words: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DREAMER_TRACEBACK": "1"}


def torchrun(processes: int, *words: str | Path) -> str:
    """Run to the end; what it printed."""
    done = subprocess.run(command(processes, *words), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "[rank" in line)
    return done.stdout + done.stderr


def signalled(signum: int, step: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """``dreamer`` in 2 processes, one of which gets a signal before this step."""
    given = command(2, ROOT / "tests" / "training" / "ranks_signal.py", str(int(signum)), str(step), *words)
    return subprocess.run(given, env=environment(), capture_output=True, text=True, timeout=240)


def made_from(alone: Run, path: Path, *parts: str) -> Path:
    """The folder of a run to which another process has already added ``parts``."""
    for part in parts:
        shutil.copytree(alone.path / part, path / part)
    return path


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(expected: Path, found: Path) -> None:
    """Every number that was logged, and the weights that came out."""
    for old, new in itertools.zip_longest(rows(expected), rows(found)):
        assert old.keys() == new.keys()
        for name, value in old.items():
            scale = 10 if name.startswith("val_") and name.endswith(("psnr", "db", "shuffled")) else 1  # decibels of tiny models
            assert new[name] == pytest.approx(value, rel=scale * TOLERANCE, abs=scale * TOLERANCE), (name, old["step"])
    weights, others = (load_file(list_checkpoints(path)[-1][1] / "model.safetensors") for path in (expected, found))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def train_all(alone: Run, processes: int, path: Path, *settings: str) -> Path:
    """Each phase in a run of its own, after the parts that one process made, and what else ranks_worker.py tells of."""
    if not path.exists():
        for phase, parts in BEFORE.items():
            made_from(alone, path / phase, *parts)
        (path / "taken" / "phase1").mkdir()
        with locked(path / "taken" / "phase1"):
            torchrun(processes, Path(__file__).with_name("ranks_worker.py"), path.parent / "config.yaml", path, *PHASES, *settings)
    return path


@pytest.fixture
def ddp(alone: Run, folder: Path) -> Path:
    """All phases in 2 processes with all weights each."""
    return train_all(alone, 2, folder / "ddp")


@pytest.fixture
def fsdp(alone: Run, folder: Path) -> Path:
    """All phases in 3 processes with a third of the trained weights each, whose layers are computed twice."""
    twice = [f"phase{i}.train.activation_checkpointing=true" for i in range(3)]
    return train_all(alone, 3, folder / "fsdp", "parallel.strategy=fsdp", *twice)


@pytest.mark.parametrize("phase", PHASES)
def test_two_processes_train_as_one(alone: Run, ddp: Path, phase: str) -> None:
    assert_same_training(alone.path / phase, ddp / phase / phase)


@pytest.mark.parametrize("phase", PHASES)
def test_three_processes_with_pieces_of_the_weights_train_as_one(alone: Run, fsdp: Path, phase: str) -> None:
    assert_same_training(alone.path / phase, fsdp / phase / phase)


@pytest.fixture
def skipped(alone: Run, folder: Path) -> Path:
    """Phase 2 in one process that has a bad gradient in one step."""
    path = folder / "skipped"
    if not path.exists():
        made_from(alone, path, *BEFORE["skipped"])
        with bad_gradient():
            train(folder / "config.yaml", path, "phase2", [f"phase2.train.accumulate={ACCUMULATE}"])
    return path / "phase2"


def training_state(path: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, whether in pieces or not."""
    checkpoint = list_checkpoints(path)[-1][1]
    tensors = {name: torch.full(t.shape, torch.nan) for name, t in saved_shapes(checkpoint, ("phase.", "ema.", "optimizer.")).items()}
    read_pieces(checkpoint, tensors)
    return tensors


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_bad_gradient_in_one_process_is_skipped_by_all(skipped: Path, strategy: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(strategy) / "skipped" / "phase2"
    assert_same_training(skipped, path)
    assert [row["skipped_steps"] for row in rows(path)] == [0, 1, 1]
    assert ["grad_norm" in row for row in rows(path)] == [True, False, True]
    expected, found = training_state(skipped), training_state(path)
    assert expected.keys() == found.keys() and all(found[name].isfinite().all() for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert (found["phase.normalizer.count"] == ACCUMULATE * (TRAIN["steps"] - 1)).all()
    counters = [t for name, t in found.items() if name.startswith("optimizer.") and name.endswith("step")]
    assert counters and all(t == TRAIN["steps"] - 1 for t in counters)


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp", 3)])
def test_where_another_training_is_at_work_all_end(strategy: str, processes: int, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(strategy) / "taken"
    folder = path / "phase1"
    for rank in range(processes):
        (line,) = (path / f"said_{rank}").read_text().splitlines()
        assert line.startswith(f"dreamer[{rank}]: error: {folder}: another process is at work here"), line
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_what_travels_in_a_step_of_pieces() -> None:
    """Float32 weights under bf16 too: for both bootstrap passes (of a row that one process alone has), the forward pass and once for the
    backward pass, whether it computes activations again or not; then the gradients. docs/scale.md plans with these 20 bytes a parameter."""
    words = next(line for line in torchrun(2, Path(__file__).with_name("ranks_traffic.py")).splitlines() if line.startswith("traffic "))
    plain, again, bootstrap, bootstrap_again = json.loads(words.removeprefix("traffic "))
    assert plain == again == pytest.approx([8, 4], rel=0.05)
    assert bootstrap == bootstrap_again == pytest.approx([16, 4], rel=0.05)


def test_an_export_is_one_file_that_loads_as_any(alone: Run, fsdp: Path) -> None:
    agent, info = load_agent(fsdp / "phase2" / "phase2")
    expected, _ = load_agent(alone.path / "phase2")
    assert info["phase"] == "phase2" and agent.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def test_pieces_hold_no_pickle_and_reading_them_calls_none(fsdp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = list_checkpoints(fsdp / "phase1" / "phase1")[-1][1]
    names = sorted(path.name for path in checkpoint.iterdir())
    pieces = [f"train_state_0000{i}_of_00003.safetensors" for i in (1, 2, 3)]
    assert names == ["manifest.json", "model.json", "model.safetensors", "state.json", *pieces]
    for path in checkpoint.glob("*.safetensors"):
        load_file(path)  # and safetensors hold numbers alone

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for where, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(where, name, refuse)
    saved = saved_shapes(checkpoint, ("phase.", "ema.", "optimizer.", "carried."))
    tensors = {name: torch.full(t.shape, torch.nan) for name, t in saved.items()}
    read_pieces(checkpoint, tensors)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    exported = load_file(checkpoint / "model.safetensors")
    averaged = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert len(averaged) > 20 and all(torch.equal(exported[name], tensor) for name, tensor in averaged.items())
    assert any(tensor.ndim == 0 for tensor in tensors.values())  # optimisers' counters


def test_a_missing_or_cut_piece_is_named(fsdp: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(list_checkpoints(fsdp / "phase1" / "phase1")[-1][1], checkpoint)
    piece = checkpoint / "train_state_00002_of_00003.safetensors"
    whole = piece.read_bytes()
    piece.unlink()
    with pytest.raises(ValueError, match=r"step_00000003: a piece of '.*' is missing; use an earlier checkpoint"):
        saved_shapes(checkpoint, ("phase.", "ema.", "optimizer."))
    piece.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"step_00000003: its training state is not readable .*use an earlier checkpoint"):
        saved_shapes(checkpoint, ("phase.", "ema.", "optimizer."))
    with pytest.raises(ValueError, match=r"step_00000003: its training state cannot be read"):
        read_pieces(checkpoint, {"phase.none": torch.zeros(2)})


LONG = ("phase1.train.steps=12", "phase1.train.validate_every=12", "phase1.train.checkpoint_every=3")


@pytest.fixture
def uninterrupted(alone: Run, folder: Path) -> Path:
    path = folder / "uninterrupted"
    if not path.exists():
        made_from(alone, path, "tokenizer", "latents")
        assert main(["train", "phase1", "--config", str(folder / "config.yaml"), f"run_dir={path}", *LONG]) == 0
    return path


@pytest.fixture
def killed(alone: Run, folder: Path, killed_strategy: str) -> Path:
    """Two processes, one of which is killed after the first checkpoint."""
    path = folder / f"killed_{killed_strategy}"
    if not path.exists():
        made_from(alone, path, "tokenizer", "latents")
        words = ("train", "phase1", "--config", folder / "config.yaml", f"run_dir={path}", *LONG, f"parallel.strategy={killed_strategy}")
        assert signalled(signal.SIGKILL, 5, *words).returncode != 0
        assert 3 <= list_checkpoints(path / "phase1")[-1][0] < 12
    return path


@pytest.mark.parametrize(("killed_strategy", "processes", "strategy"), [("ddp", 1, "ddp"), ("fsdp", 3, "fsdp"), ("fsdp", 2, "ddp")])
def test_one_is_killed_and_another_number_of_processes_goes_on(
    uninterrupted: Path, killed: Path, folder: Path, tmp_path: Path, processes: int, strategy: str
) -> None:
    path = tmp_path / "run"
    shutil.copytree(killed, path)
    words = ["train", "phase1", "--config", str(folder / "config.yaml"), f"run_dir={path}", *LONG, f"parallel.strategy={strategy}"]
    if processes == 1:
        assert main(words) == 0
    else:
        assert torchrun(processes, "-m", "dreamer", *words).count("phase1: done in") == 1  # one of them speaks
    assert_same_training(uninterrupted / "phase1", path / "phase1")
    assert [row["step"] for row in rows(path / "phase1")] == list(range(1, 13))
    assert newest_checkpoint(path / "phase1") is not None


def test_a_signal_to_one_makes_all_save_the_same_step(alone: Run, uninterrupted: Path, folder: Path, tmp_path: Path) -> None:
    path = made_from(alone, tmp_path / "run", "tokenizer", "latents")
    words = ["train", "phase1", "--config", str(folder / "config.yaml"), f"run_dir={path}", *LONG, "phase1.train.checkpoint_every=12"]
    done = signalled(signal.SIGTERM, 4, *words, "phase1.train.validate_every=5")
    assert done.returncode != 0
    ((step, checkpoint),) = list_checkpoints(path / "phase1")
    assert (step, checkpoint.name) == (5, "interim_step_00000005"), done.stderr
    assert "flow_loss" in read_state(checkpoint)["unfinished"]  # the validation of this step is left to the run that goes on
    assert done.stderr.count("dreamer: interrupted; run the same command again to go on") == 2  # not only the one that heard it
    assert main(words) == 0
    assert_same_training(uninterrupted / "phase1", path / "phase1")


def test_processes_share_the_encoding(alone: Run, tmp_path: Path) -> None:
    words = ["--data-path", str(alone.episodes_path), "--tokenizer", str(alone.path / "tokenizer"), "--shard-episodes", "3"]
    assert main(["pretokenize", *words, "--output-path", str(tmp_path / "one")]) == 0
    torchrun(2, "-m", "dreamer", "pretokenize", *words, "--output-path", tmp_path / "two")
    one, two = LatentStore(tmp_path / "one"), LatentStore(tmp_path / "two")
    assert two.is_complete and two.num_groups == 4
    assert one.source_fingerprint == two.source_fingerprint and len(one) == len(two) == 12
    for name in sorted(path.name for path in (tmp_path / "one").glob("*.safetensors")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_work_for_one_process_is_refused_for_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for words in (["record"], ["demo"], ["evaluate", "agent"], ["report"], ["check"], ["runs"]):
        given = [] if words == ["runs"] else [f"run_dir={tmp_path}"]
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"dreamer[1]: error: WORLD_SIZE is 2: dreamer {words[0]} is work for one process; run it once"), error
    assert list(tmp_path.iterdir()) == []


def test_without_an_address_the_other_processes_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: Run, folder: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "phase1", "--config", str(folder / "config.yaml"), f"run_dir={alone.path}"]) == 2
    assert "process 0 of 2 cannot join the others" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2")])
def test_strange_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="RANK/WORLD_SIZE is .*expected i/n"):
        Ranks.from_environment()


def test_dropout_is_refused_for_several_processes() -> None:
    with pytest.raises(ValueError, match=r"dropout is 0\.1: each process draws its own"):
        Parallel(Ranks(0, 2)).wrap(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_muon_is_refused_for_pieces(group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    piece = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="muon, which needs whole matrices, and parallel.strategy fsdp cuts them; use adamw, or ddp"):
        make_optimizers({"dynamics.layers.0.weight": piece}, OptimConfig(optimizer="muon"))
    assert make_optimizers({"dynamics.layers.0.weight": piece}, OptimConfig())


def test_a_carried_rollout_goes_on_from_pieces(alone: Run, folder: Path, tmp_path: Path) -> None:
    """Between two updates on the same rollout; its masks are no floats."""
    path = made_from(alone, tmp_path / "run", "tokenizer", "latents", "phase2")
    words = ["train", "phase3", "--config", str(folder / "config.yaml"), f"run_dir={path}"]
    done = signalled(signal.SIGTERM, 0, *words, "parallel.strategy=fsdp")
    assert [step for step, _ in list_checkpoints(path / "phase3")] == [1], done.stderr
    shutil.copytree(path, tmp_path / "other")
    assert main(words) == 0
    assert_same_training(alone.path / "phase3", path / "phase3")
    words[-1] = f"run_dir={tmp_path / 'other'}"
    torchrun(2, "-m", "dreamer", *words, "parallel.strategy=fsdp")
    assert_same_training(alone.path / "phase3", tmp_path / "other" / "phase3")


def test_an_interrupted_validation_is_made_by_several(alone: Run, uninterrupted: Path, folder: Path, tmp_path: Path) -> None:
    """Before any training step of theirs: layers are called before the whole model is."""
    path = made_from(alone, tmp_path / "run", "tokenizer", "latents")
    words = ["train", "phase1", "--config", str(folder / "config.yaml"), f"run_dir={path}", *LONG, "phase1.train.validate_every=6"]
    run = Run(load_config(DreamerConfig, folder / "config.yaml", words[4:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupted(Trainer._validate))
        with pytest.raises(Interrupted):
            STAGES["phase1"](run)
    assert [path.name for _, path in list_checkpoints(run.path / "phase1")][-1] == "interim_step_00000006"
    torchrun(2, "-m", "dreamer", *words, "parallel.strategy=fsdp")
    for old, new in zip(rows(uninterrupted / "phase1"), rows(path / "phase1"), strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=TOLERANCE)


def interrupted(validate: Callable[..., Any]) -> Callable[..., Any]:
    def with_signal(self: Trainer, metrics: Any, logger: Any, hook: Callable[..., Any], stop: Any) -> Any:
        def signalled_hook(*arguments: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return hook(*arguments)

        return validate(self, metrics, logger, signalled_hook, stop)

    return with_signal


def test_a_signal_after_that_of_another_process_is_not_a_second_one() -> None:
    stop = Stop("saving", ECHO_OF_SEVERAL)
    stop.agree(0)
    assert not stop.is_wanted
    stop.agree(signal.SIGTERM)
    assert stop.is_wanted
    stop.on_signal(signal.SIGTERM, None)  # its own, which comes later: the save goes on
    stop.agree(signal.SIGINT)
    assert stop.signum == signal.SIGTERM


def test_what_is_best_is_decided_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On GPUs a last bit of a validation may differ between processes: they must not save at different steps."""
    told: list[Any] = []

    def main_does(self: Parallel, work: Callable[[], Any]) -> Any:
        told.append(work())
        return {"val_loss": 1.0}

    monkeypatch.setattr(Parallel, "main_does", main_does)
    trainer = SimpleNamespace(
        parallel=Parallel(), step=3, averaged_weights=nullcontext, _loggable=lambda m: m, _breakable=lambda stop: nullcontext()
    )
    logger, stop = SilentLogger(tmp_path, "phase1", total_steps=3), Stop("saving", 0.5)
    measured = Trainer._validate(trainer, {}, logger, lambda logger, step: {"val_loss": 1.0 + 1e-7}, stop)  # pyright: ignore[reportArgumentType]
    assert measured == {"val_loss": 1.0}
    with pytest.raises(ValueError, match="'loss' is nan at step 3"):
        logger.log(3, {"loss": float("nan")})  # ends as the process does that writes
    assert told == [{"val_loss": 1.0 + 1e-7}]
