"""The training loop on a toy: exact resume, bad steps, averaged weights, settings."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamer.training import loop
from dreamer.training.checkpoint import list_checkpoints
from dreamer.training.loop import MAX_BAD_STEPS, Phase, TrainConfig, Trainer, TrainingDiverged
from dreamer.training.optim import OptimConfig
from dreamer.training.resume_checks import check_same_settings


@dataclass(frozen=True)
class Toy:
    x: Tensor

    def to(self, device: Any) -> Toy:
        return self


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.out = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


class ToyPhase(Phase):
    """Noise from the generator, something carried from step to step, and a buffer that is set before export."""

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = Line()
        self.model.register_buffer("stamp", torch.zeros(1))
        self.memory: Tensor | None = None
        self.bad_steps = bad_steps

    def forward(self, batch: Toy, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if self.memory is None or step % 4 == 0:
            self.memory = torch.randn(4, generator=generator)
        noise = torch.randn(batch.x.shape, generator=generator) * 0.1
        hidden = self.model.layers[0](batch.x + noise + self.memory)
        loss = (self.model.out(torch.tanh(hidden)) - batch.x.sum(-1, keepdim=True)).square().mean()
        if step in self.bad_steps:
            loss = loss * float("nan")
        return loss, {"error": loss.detach()}

    def before_export(self) -> None:
        self.model.stamp.fill_(float(self.model.out.weight.sum()))

    def carried(self) -> dict[str, Tensor]:
        return {} if self.memory is None else {"memory": self.memory}

    def carry(self, tensors: dict[str, Tensor]) -> None:
        self.memory = tensors["memory"]

    def check_carried(self, tensors: dict[str, Tensor], step: int) -> None:
        if tensors.keys() != {"memory"}:
            raise ValueError(f"'carried' holds {sorted(tensors)}; expected memory")


def stream(start: int) -> Iterator[Toy]:
    step = start
    while True:
        yield Toy(torch.randn(5, 4, generator=torch.Generator().manual_seed(step)))
        step += 1


def config(**changes: Any) -> TrainConfig:
    values = {"steps": 13, "log_every": 2, "validate_every": 5, "checkpoint_every": 3, "optim": OptimConfig(warmup_steps=2), **changes}
    return TrainConfig(**values)


def validate(logger: Any, step: int) -> dict[str, float]:
    return {"val": step / 2}


def train(folder: Path, train_config: TrainConfig, phase: ToyPhase | None = None, **options: Any) -> Trainer:
    settings, info = {"toy": {"a": 1}}, {"kind": "toy"}
    trainer = Trainer(phase or ToyPhase(), train_config, folder / "toy", seed=0, settings=settings, model_info=info)
    trainer.run(options.get("batches", stream), validate)
    return trainer


def files(folder: Path) -> dict[str, bytes]:
    found = [p for p in (folder / "toy").rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop_at", [1, 3, 7, 12])
def test_resumes_to_the_same_bytes(tmp_path: Path, optimizer: Any, stop_at: int) -> None:
    settings = config(optim=OptimConfig(optimizer=optimizer, warmup_steps=2, decay_fraction=0.5), accumulate=2)
    train(tmp_path / "whole", settings)

    def interrupted(start: int) -> Iterator[Toy]:
        for count, batch in enumerate(stream(start)):
            if start + count == 2 * stop_at:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", settings, batches=interrupted)
    assert max([0, *(step for step, _ in list_checkpoints(tmp_path / "parts" / "toy"))]) == stop_at // 3 * 3
    train(tmp_path / "parts", settings)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path, config())
    before = files(tmp_path)

    def no_batches(start: int) -> Iterator[Toy]:
        raise AssertionError("a finished run needs no data")

    train(tmp_path, config(), batches=no_batches)
    assert files(tmp_path) == before


def test_exports_are_the_averaged_weights_with_what_before_export_made_of_them(tmp_path: Path) -> None:
    trainer = train(tmp_path, config())
    exported = load_file(list_checkpoints(tmp_path / "toy")[-1][1] / "model.safetensors")
    for name, average in trainer.ema.items():
        assert torch.equal(exported[name], average)
        assert not torch.equal(trainer.parameters[name], average)
    assert torch.allclose(exported["stamp"], trainer.ema["out.weight"].sum())
    assert "frozen.weight" in exported and "frozen.weight" not in trainer.parameters


def test_bad_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    trainer = train(tmp_path, config(), ToyPhase(bad_steps=(3, 4)))
    assert trainer.num_skipped == 2 and all(p.isfinite().all() for p in trainer.parameters.values())
    rows = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 12, 13]
    assert [("error" in row, row["skipped_steps"]) for row in rows[:4]] == [(True, 0), (False, 1), (False, 2), (True, 2)]


def test_a_skipped_step_changes_no_weight(tmp_path: Path) -> None:
    trainer = Trainer(ToyPhase(bad_steps=(0,)), config(), tmp_path / "toy", seed=0, settings={}, model_info={})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.train_step([next(stream(0))])
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())


def test_training_stops_when_every_step_is_bad_and_the_checkpoint_stays(tmp_path: Path) -> None:
    train(tmp_path, config(steps=6))
    (before,) = [path for step, path in list_checkpoints(tmp_path / "toy") if step == 6]
    kept = {p.name: p.read_bytes() for p in before.iterdir()}
    phase, settings = ToyPhase(bad_steps=tuple(range(6, 40))), {"toy": {"a": 1}}
    trainer = Trainer(phase, config(steps=40), tmp_path / "toy", seed=0, settings=settings, model_info={})
    assert trainer.step == 6
    with pytest.raises(TrainingDiverged, match=rf"not finite {MAX_BAD_STEPS} steps in a row.*optim\.learning_rate"):
        trainer.run(stream)
    assert {p.name: p.read_bytes() for p in before.iterdir()} == kept
    assert [step for step, _ in list_checkpoints(tmp_path / "toy")][-1] <= 6 + MAX_BAD_STEPS


@pytest.mark.parametrize(
    ("changes", "words"), [({"settings": {"toy": {"a": 2}}}, "toy.a=1, this config says 2"), ({"seed": 5}, "seed=0, this config says 5")]
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    train(tmp_path, config())
    arguments = {"seed": 0, "settings": {"toy": {"a": 1}}, "model_info": {}, **changes}
    with pytest.raises(ValueError, match=re.escape(words)):
        Trainer(ToyPhase(), config(), tmp_path / "toy", **arguments)


def test_what_does_not_decide_the_weights_may_change(tmp_path: Path) -> None:
    saved = {"toy": {"log_every": 1, "checkpoint_every": 5, "keep_last": 2, "keep_best": None}}
    now = {"log_every": 7, "checkpoint_every": 2, "keep_last": 3, "keep_best": {"metric": "val", "better": "lower"}}
    check_same_settings(saved, {"toy": now}, tmp_path)


def test_accumulating_equals_a_larger_batch(tmp_path: Path) -> None:
    class Plain(ToyPhase):
        def forward(self, batch: Toy, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            return self.model.out(torch.tanh(self.model.layers[0](batch.x))).square().mean(), {}

    batches = [next(stream(0)), next(stream(1))]
    weights = []
    for given in (batches, [Toy(torch.cat([b.x for b in batches]))]):
        trainer = Trainer(Plain(), config(accumulate=len(given)), tmp_path / "toy", seed=0, settings={}, model_info={})
        trainer.train_step(given)
        weights.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name])


def test_validation_sees_the_averaged_weights_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    phase, seen = ToyPhase(), []
    trainer = Trainer(phase, config(), tmp_path / "toy", seed=0, settings={}, model_info={})
    check: Callable[[Any, int], dict[str, float]] = lambda logger, step: seen.append(phase.model.out.weight.clone()) or {}  # noqa: E731
    before_last: list[Tensor] = []

    def watched(start: int) -> Iterator[Toy]:
        for batch in stream(start):
            before_last.append(phase.model.out.weight.detach().clone())
            yield batch

    trainer.run(watched, check)
    assert len(seen) == 3 and torch.equal(seen[-1], trainer.ema["out.weight"])
    assert not torch.equal(seen[0], before_last[5])  # the sixth step began with the raw weights


def test_noise_depends_on_its_key_alone() -> None:
    def draw(*key: object) -> list[float]:
        return torch.rand(3, generator=loop.step_generator(torch.device("cpu"), *key)).tolist()

    torch.manual_seed(1)
    first = draw(0, "phase1", 5)
    torch.manual_seed(2)
    assert draw(0, "phase1", 5) == first
    assert all(draw(*key) != first for key in ((1, "phase1", 5), (0, "phase2", 5), (0, "phase1", 6)))


def test_the_progress_bar_follows_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(loop.RunLogger, "advance", lambda self, step: steps.append(step))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    train(tmp_path, config())
    assert steps == list(range(1, 14))


@pytest.mark.parametrize("name", ["state.json", "train_state.safetensors", "model.safetensors"])
def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, config())
    expected = files(tmp_path)
    newest = list_checkpoints(tmp_path / "toy")[-1][1]
    (newest / name).write_bytes(b"{}")
    assert train(tmp_path, config()).step == 13
    assert re.search(rf"{name}: has 2 bytes, expected \d+: .*damaged, and step_00000012 is used in its place; it is now", caplog.text)
    aside = {name: data for name, data in files(tmp_path).items() if "/damaged_" in name}
    assert {name: data for name, data in files(tmp_path).items() if name not in aside} == expected and len(aside) == 5


def test_where_every_checkpoint_is_damaged_training_does_not_begin_anew(tmp_path: Path) -> None:
    train(tmp_path, config())
    for _, path in list_checkpoints(tmp_path / "toy"):
        (path / "state.json").write_text("{}")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="none of 2 checkpoints is sound"):
        train(tmp_path, config())
    assert files(tmp_path) == before


def best_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "toy" / "checkpoints" / "best.json").read_text())


@pytest.mark.parametrize(("better", "step"), [("lower", 5), ("higher", 10)])
def test_the_best_checkpoint_by_a_metric_is_kept(tmp_path: Path, better: Any, step: int) -> None:
    values = {5: 1.0, 10: 3.0, 13: 2.0}

    def judged(logger: Any, step: int) -> dict[str, float]:
        return {"val": values[step]}

    settings = config(keep_last=1, keep_best={"metric": "val", "better": better})
    for stop_at in (None, 4, 7, 11):
        folder = tmp_path / str(stop_at)
        for stops in [stop_at, None] if stop_at else [None]:
            trainer = Trainer(ToyPhase(), settings, folder / "toy", seed=0, settings={"toy": {"a": 1}}, model_info={"kind": "toy"})
            try:
                trainer.run(stopping(stops), judged)
            except KeyboardInterrupt:
                assert stops is not None
        assert [step for step, _ in list_checkpoints(folder / "toy")] == [step, 13]
        assert best_of(folder) == {"step": step, "metric": "val", "better": better, "value": values[step]}
        assert files(folder) == {name: data for name, data in files(tmp_path / "None").items()}


def stopping(stop_at: int | None) -> Callable[[int], Iterator[Toy]]:
    def batches(start: int) -> Iterator[Toy]:
        for count, batch in enumerate(stream(start)):
            if start + count == stop_at:
                raise KeyboardInterrupt
            yield batch

    return batches


def test_another_metric_begins_to_look_for_the_best_anew(tmp_path: Path) -> None:
    def train_to(steps: int, **keep_best: Any) -> None:
        settings = {"toy": {"a": 1}}
        trainer = Trainer(ToyPhase(), config(steps=steps, keep_best=keep_best), tmp_path / "toy", seed=0, settings=settings, model_info={})
        trainer.run(stream, validate)

    train_to(5, metric="val")
    assert best_of(tmp_path)["step"] == 5
    train_to(13, metric="val", better="higher")
    assert best_of(tmp_path) == {"step": 13, "metric": "val", "better": "higher", "value": 6.5}


def test_a_best_by_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"toy\.train\.keep_best\.metric is 'val_psnr'; a validation here measures val$"):
        train(tmp_path, config(keep_best={"metric": "val_psnr"}))
