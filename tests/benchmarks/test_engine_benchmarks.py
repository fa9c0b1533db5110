"""The benchmarks of training step and generation at a small size: what they count, and what they write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreamer.models import AgentConfig

ROOT = Path(__file__).parents[2]
TRANSFORMER = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "time_every": 2}
SMALL = AgentConfig.model_validate({"dynamics": {"transformer": TRANSFORMER}, "heads": {"hidden": 16}})


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> Any:
        module = importlib.import_module(name)
        if hasattr(module, "SIZE"):
            monkeypatch.setattr(module, "SIZE", {"cpu": 64})
        return module

    load("machine")
    return load


def test_operations_are_those_of_the_products_and_the_rate_is_of_this_run(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine = load("machine").Machine("cpu", None)
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    found = machine.measure("product", lambda: a @ b, tokens=8, precision="fp32", seconds=0.0)
    assert found.flops == 2 * 8 * 16 * 4
    assert found.runs == 3 and 0 < found.seconds <= found.median_seconds
    assert found.flops_per_second == pytest.approx(found.flops / found.seconds)
    assert found.share == pytest.approx(found.flops_per_second / machine.matrix_rates["fp32"])
    assert found.tokens_per_second == pytest.approx(8 / found.seconds)
    assert "of the matrix rate" in capsys.readouterr().out


def test_a_run_is_timed_until_its_seconds_are_over_and_without_its_first_two(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load("machine")
    clock = iter([t for began, took in enumerate([50.0, 40.0, 2.0, 1.0, 2.0, 1.0, 2.0]) for t in (1000.0 * began, 1000.0 * began + took)])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert machine.timed(lambda: None, torch.device("cpu"), seconds=6.0) == [2.0, 1.0, 2.0, 1.0]


def test_the_training_step_is_that_of_the_issue(load: Any) -> None:
    """124 GFLOP by hand for the matrices inside the layers: 22 tokens a latent step, 3 passes over 4 clips and 2 over one of them."""
    workload, step_cost = load("workload"), importlib.import_module("dreamer.pipeline.step_cost")
    losses, phase1, loop = (importlib.import_module(f"dreamer.{name}") for name in ("losses", "training.phase1", "training.loop"))
    cpu = torch.device("cpu")
    phase = lambda: phase1.Phase1(workload.make_agent(torch.device("meta")), losses.ShortcutForcingConfig())  # noqa: E731
    cost = step_cost.simulate_step(phase, lambda: workload.make_batch(4, workload.STEPS, cpu), loop.TrainConfig())
    hidden, width = 680, 256
    inside_layers = 2 * 8 * (4 * width * width + 3 * width * hidden) * 22 * workload.STEPS * (3 * 4 + 2 * 1)
    assert inside_layers == pytest.approx(124e9, rel=0.01)
    assert inside_layers < cost.flops < 1.03 * inside_layers


def test_a_trainer_of_the_benchmark_trains_and_writes_nothing(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, machine = load("training_step"), load("machine").Machine("cpu", None)
    trainer = module.make_trainer(machine.device, "fp32", False, SMALL)
    before = [p.clone() for p in trainer.parameters.values()]
    batch = load("workload").make_batch(2, 3, machine.device)
    found = machine.measure("step", lambda: trainer.train_step([batch]), tokens=2 * 3 * 16, precision="fp32", seconds=0.0)
    assert found.flops > 0
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters.values(), before, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_generation_is_measured_and_written(load: Any, tmp_path: Path) -> None:
    module, machine = load("generation"), load("machine").Machine("cpu", None)
    sampler = module.make_sampler(machine.device, 2, False, SMALL)
    found = module.generation(machine, sampler, "fp32", rows=2, seconds=0.0, name="2 clips")
    assert found.tokens_per_second == pytest.approx(2 * 16 * 16 / found.seconds)
    tenths = module.long_dream(sampler, 20, machine.device)
    assert [tenth["steps"] for tenth in tenths] == list(range(2, 21, 2))
    machine.write(tmp_path / "figures.json", tenths=tenths)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["figures"][0]["flops"] == found.flops and written["tenths"] == tenths
    assert written["hardware"]["PyTorch"] == torch.__version__


def test_a_tokenizer_is_measured_both_ways(load: Any) -> None:
    """Tokens are those of the latents; decoding and encoding each count their own operations."""
    module, machine = load("tokenizer"), load("machine").Machine("cpu", None)
    names = [name for name, _ in module.tokenizers(with_cosmos=False)]
    assert names == ["demo", "vpt_causal"]
    name, tokenizer = next(module.tokenizers(with_cosmos=False))
    encoding, decoding = module.both_ways(machine, name, tokenizer, 2, precision="fp32", seconds=0.0)
    rows, columns = tokenizer.token_grid
    for figures in (encoding, decoding):
        assert figures.flops > 0 and figures.tokens_per_second == pytest.approx(2 * rows * columns / figures.seconds)
    with pytest.raises(SystemExit):
        module.command_line().parse_args(["--compile"])  # it compiles nothing


def test_generation_and_training_step_can_compile(load: Any) -> None:
    for name in ("generation", "training_step"):
        assert load(name).command_line().parse_args(["--compile"]).compile
