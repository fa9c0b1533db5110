"""A checkpoint that is whole, but says something else than this training would have saved, is refused by name; so are files beside it."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamer.models import Agent, AgentConfig
from dreamer.training.distributed import Ranks
from dreamer.training.loop import Phase, TrainConfig, Trainer
from dreamer.training.optim import OptimConfig
from dreamer.training.phase3 import ImaginationConfig, Phase3
from dreamer.training.sharded_state import write_pieces
from dreamer.types import ActionComponent, ActionSpace, Trajectory
from fuzz.targets.weights import sealed

REMEDY = "; remove the folder of this checkpoint to use an earlier one"
Change = Callable[[dict[str, Any]], None]


class Rows:
    def to(self, device: Any) -> Rows:
        return self


class Stream:
    def __next__(self) -> Rows:
        return Rows()

    def close(self) -> None: ...


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(OrderedDict(layers=nn.Linear(2, 2)))  # Muon's, but for the bias
        self.late = nn.Linear(2, 1)  # learns from step 2 on
        self.idle = nn.Parameter(torch.zeros(3))  # never


class TwoPhase(Phase):
    def __init__(self, bad_steps: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.bad_steps = Two(), bad_steps

    def forward(self, batch: Rows, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.model.net(torch.randn(4, 2, generator=generator))
        loss = hidden.square().mean() + (self.model.late(hidden).square().mean() if step >= 2 else 0)
        return loss * (float("nan") if step < self.bad_steps else 1), {}


def trainer(folder: Path, phase: Phase | None = None, settings: Any = None, **changes: Any) -> Trainer:
    values = {"steps": 9, "keep_best": {"metric": "val"}, "optim": OptimConfig(optimizer="muon")} | changes
    return Trainer(
        phase or TwoPhase(), TrainConfig.model_validate(values), folder / "two", seed=0, settings=settings or {"a": 1}, model_info={}
    )


def saved(folder: Path, steps: int = 3, phase: Phase | None = None, **changes: Any) -> Path:
    """A checkpoint after so many steps."""
    made = trainer(folder, phase, **changes)
    for made.step in range(steps):
        made.train_step([Rows()])
    made.step, made.best = steps, {"step": steps, "metric": "val", "better": "lower", "value": 0.5}
    return made.save()


def change(checkpoint: Path, name: str, content: bytes) -> None:
    for place, data in sealed(checkpoint, lambda data: {name: data})(content).items():
        (checkpoint / place).write_bytes(data)


def change_state(checkpoint: Path, make: Change) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    make(state)
    change(checkpoint, "state.json", json.dumps(state).encode())


def change_tensors(checkpoint: Path, make: Change) -> None:
    file = checkpoint / "train_state.safetensors"
    tensors = load_file(file)
    make(tensors)
    save_file(tensors, checkpoint.parent / "changed")
    change(checkpoint, file.name, (checkpoint.parent / "changed").read_bytes())
    (checkpoint.parent / "changed").unlink()


def refused(file: Path, resume: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        resume()
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and REMEDY in text and "expected" in text and "\n" not in text and len(text) < 1000
    return text.removeprefix(f"{file}: ")


def without(prefix: str) -> Change:
    def make(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return make


BEST = {"step": 3, "metric": "val", "better": "lower", "value": 0.5}


@pytest.mark.parametrize(
    "values",
    [
        *({"best": best} for best in (3, [], {}, {"step": 4}, BEST | {"step": "3"}, BEST | {"metric": 1}, BEST | {"better": "best"})),
        *({"best": BEST | {"value": value}} for value in (None, "1", True, float("nan"), 10**400)),
        {"best": BEST | {"more": 1}},
        *({"unfinished": row} for row in ("x", [], {"loss": "x"}, {"loss": None}, {"loss": 10**400}, {"step": 1})),
        *({"bad_in_a_row": count} for count in ("x", None, -1, 1.0, True, 1)),
        *({"num_skipped": count} for count in ("x", -1, 1.0, True, 4, 10**400)),
        *({"seed": seed} for seed in ("x", 0.0, False)),
        *({"settings": settings} for settings in (None, [], "x", 3)),
        *({"step": step} for step in ("3", 2, 3.0, -1)),
        *({"without_moments": names} for names in (None, "idle", [3], {"idle": 1})),
    ],
    ids=lambda values: str(values)[:50],
)
def test_a_state_of_other_types_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    path = saved(tmp_path)
    change_state(path, lambda state: state.update(values))
    assert next(iter(values)) in refused(path / "state.json", lambda: trainer(tmp_path)) or "step" in values


def set_to(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def renamed(name: str, other: str) -> Change:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


TENSORS: dict[str, tuple[Change, str]] = {
    "no optimizer": (without("optimizer."), "lacks every 'optimizer.' tensor; expected those of 3 steps"),
    "no ema": (without("ema."), r"lacks 'ema\.idle'; expected float32 of shape \(3,\)"),
    "one moment": (without("optimizer.1.1.exp_avg_sq"), r"lacks 'optimizer\.1\.1\.exp_avg_sq'; expected float32 of shape \(2,\)"),
    "moments of one": (without("optimizer.0.0."), r"lacks 'optimizer\.0\.0\.momentum_buffer'"),
    "moments of one that learned late": (without("optimizer.1.2."), r"lacks 'optimizer\.1\.2\.step'; expected float32 of shape \(\)"),
    "no phase": (without("phase."), r"lacks 'phase\.model\.idle'"),
    "unknown ema": (lambda t: t.update({"ema.x": torch.zeros(1)}), "holds 'ema.x'; expected no tensor of that name"),
    "renamed ema": (renamed("ema.late.bias", "ema.x"), r"lacks 'ema\.late\.bias'"),
    "shape of ema": (set_to("ema.late.bias", lambda t: t.repeat(2)), r"'ema\.late\.bias' is float32 of shape \(2,\); expected .*\(1,\)"),
    "type of ema": (set_to("ema.late.bias", torch.Tensor.long), r"'ema\.late\.bias' is int64 of shape \(1,\); expected float32"),
    "other float": (set_to("ema.late.bias", torch.Tensor.double), r"'ema\.late\.bias' is float64"),
    "type of weight": (set_to("phase.model.idle", torch.Tensor.long), r"'phase\.model\.idle' is int64"),
    "shape of moment": (set_to("optimizer.1.1.exp_avg", lambda t: t[:1].clone()), r"'optimizer\.1\.1\.exp_avg' is float32 of shape \(1,\)"),
    "type of moment": (set_to("optimizer.0.0.momentum_buffer", torch.Tensor.bool), r"momentum_buffer' is bool"),
    "shape of counter": (set_to("optimizer.1.1.step", lambda t: t.repeat(2)), r"'optimizer\.1\.1\.step' is float32 of shape \(2,\)"),
    **{
        f"counter {value}": (
            set_to("optimizer.1.1.step", lambda t, value=value: torch.tensor(value)),
            "expected a number of steps from 1 to 3",
        )
        for value in (0.0, -1.0, 1.5, 4.0, float("nan"), float("inf"))
    },
    **{
        f"unknown {name}": (lambda t, name=name: t.update({name: torch.zeros(1)}), f"holds '{re.escape(name[:100])}")
        for name in (
            "optimizer.x",
            "optimizer.0.9.exp_avg",
            "optimizer.0.0.step",
            "optimizer.y.0.z",
            "x",
            "emax.idle",
            "phase.x",
            "y" * 5000,
        )
    },
    "moments of idle": (
        lambda t: t.update({"optimizer.1.0.exp_avg": torch.zeros(3)}),
        "holds 'optimizer.' tensors of 'idle'; expected otherwise",
    ),
    "carried": (lambda t: t.update({"carried.x": torch.zeros(1)}), "holds 'carried.x'; expected nothing that is carried"),
    "carried number": (lambda t: t.update({"carried.x": torch.zeros(())}), "'carried.x' is one number"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_training_state_of_other_tensors_is_refused(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path)
    make, words = TENSORS[case]
    change_tensors(path, make)
    assert re.search(words, refused(path / "train_state.safetensors", lambda: trainer(tmp_path)))


def older(state: dict[str, Any]) -> None:
    del state["without_moments"]


@pytest.mark.parametrize("make", [lambda state: None, older], ids=["told", "older"])
@pytest.mark.parametrize(
    ("steps", "bad_steps", "idle"),
    [
        (1, 0, ["idle", "late.weight", "late.bias"]),
        (2, 2, ["idle", "net.layers.weight", "net.layers.bias", "late.weight", "late.bias"]),
        (3, 1, ["idle"]),
    ],
)
def test_parameters_without_a_gradient_so_far_have_no_moments(
    tmp_path: Path, make: Change, steps: int, bad_steps: int, idle: list[str]
) -> None:
    path = saved(tmp_path, steps, TwoPhase(bad_steps))
    assert json.loads((path / "state.json").read_text())["without_moments"] == idle
    change_state(path, make)
    resumed = trainer(tmp_path)
    assert resumed.step == steps and resumed.num_skipped == bad_steps
    resumed.run(lambda start: Stream(), lambda logger, step: {"val": 1.0})
    assert resumed.is_finished


def test_what_an_older_checkpoint_lacks_is_refused_where_the_phase_leaves_out_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path)
    change_state(path, older)
    phase = TwoPhase()
    phase.leaves_out = False
    assert "lacks 'optimizer.1.0.step'" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path, phase))
    change_tensors(path, without("optimizer."))
    assert "lacks every 'optimizer.' tensor" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path))


def test_moments_that_no_step_can_have_made_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    change_state(path, lambda state: state.update(num_skipped=3))
    assert "holds 'optimizer.' tensors; expected none" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path))
    change_state(path, lambda state: state.update(num_skipped=0, without_moments=["x"]))
    assert "trains no parameter 'x'; expected" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path))


def test_without_an_average_there_is_none_to_resume_with(tmp_path: Path) -> None:
    path = saved(tmp_path, ema_decay=0.0)
    assert trainer(tmp_path, ema_decay=0.0).ema == {}
    assert "lacks 'ema.idle'" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path))
    change_tensors(path, lambda tensors: tensors.update({"ema.idle": torch.zeros(3)}))
    assert "holds 'ema.idle'; expected no" in refused(path / "train_state.safetensors", lambda: trainer(tmp_path, ema_decay=0.0))


@pytest.mark.parametrize("case", [case for case in TENSORS if "counter nan" not in case])
def test_pieces_are_compared_before_they_are_read(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path)
    file = path / "train_state.safetensors"
    tensors = load_file(file)
    file.unlink()

    def put(tensors: dict[str, Tensor]) -> None:
        (piece,) = write_pieces(path, tensors, Ranks())
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"].pop(file.name, None)
        (path / "manifest.json").write_text(json.dumps(manifest))
        change(path, piece.name, piece.read_bytes())

    put(tensors)
    before = trainer(tmp_path)
    assert before.step == 3
    make, words = TENSORS[case]
    make(tensors)
    put(tensors)
    assert re.search(words, refused(path, lambda: trainer(tmp_path)))


# ---- phase 3 ----------------------------------------------------------------------------------------------------------------

SIDE = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "time_every": 1, "context_length": 4, "mlp_ratio": 1}
SPACE = ActionSpace((ActionComponent("move", "categorical", 5),))


def dreaming(updates: int = 1) -> Phase3:
    torch.manual_seed(0)
    heads = {"hidden": 4, "num_distances": 1, "num_bins": 3, "bin_range": 3.0}
    dynamics = {"transformer": SIDE, "num_registers": 1, "max_steps": 4}
    config = AgentConfig.model_validate({"dynamics": dynamics, "heads": heads})
    agent = Agent(config, action_space=SPACE, token_grid=(1, 1), latent_channels=2)
    imagination = {"rollout": {"horizon": 3, "context": 2}, "value_only_steps": 2, "updates_per_rollout": updates}
    return Dreams(agent, ImaginationConfig.model_validate(imagination))


class Dreams(Phase3):
    """Learns from a dream that nobody dreamed."""

    def forward(self, batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shapes = {"features": (2, 4, 8), "actions": (2, 3, 1, 1), "rewards": (2, 3), "continues": (2, 3), "latents": (2, 4, 1, 2)}
        dream = {name: torch.ones(shape) for name, shape in shapes.items()} | {"has_ended": torch.zeros(2, dtype=torch.bool)}
        self.trajectory = Trajectory(**dream)
        return self.score(self.trajectory, with_policy=step >= self.config.value_only_steps)


CARRIED: dict[str, tuple[Change, str]] = {
    "none": (without("carried."), "lacks 'carried.features'; expected the rollout's features, actions"),
    "one less": (without("carried.rewards"), "lacks 'carried.rewards'"),
    "one more": (lambda t: t.update({"carried.x": torch.zeros(2)}), "holds 'carried.x'; expected the rollout's features"),
    "fewer rows": (
        set_to("carried.actions", lambda t: t[:1].clone()),
        r"'carried\.actions' is float32 of shape \(1, 3, 1, 1\); expected .*\(2, 3",
    ),
    "no rows": (
        lambda t: t.update({n: v[:0].clone() for n, v in t.items() if n.startswith("carried.")}),
        r"' is float32 of shape \(0, ",
    ),
    "a shorter dream": (set_to("carried.latents", lambda t: t[:, :3].clone()), r"'carried\.latents' is float32 of shape \(2, 3, 1, 2\)"),
    "numbers for a mask": (
        set_to("carried.has_ended", torch.Tensor.float),
        r"'carried\.has_ended' is float32 of shape \(2,\); expected bool",
    ),
    "whole numbers": (set_to("carried.rewards", torch.Tensor.long), r"'carried\.rewards' is int64"),
    "a number": (set_to("carried.rewards", lambda t: t[0, 0].clone()), r"'carried\.rewards' is one number"),
}


@pytest.mark.parametrize("case", CARRIED)
def test_another_rollout_than_phase_3_carries_is_refused(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path, 3, dreaming(updates=2))
    make, words = CARRIED[case]
    assert trainer(tmp_path, dreaming(updates=2)).step == 3
    change_tensors(path, make)
    assert re.search(words, refused(path / "train_state.safetensors", lambda: trainer(tmp_path, dreaming(updates=2))))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_policy_of_phase_3_has_moments_once_it_learns(tmp_path: Path, steps: int) -> None:
    path = saved(tmp_path, steps, dreaming())
    assert any("policy" in name for name in json.loads((path / "state.json").read_text())["without_moments"]) == (steps < 3)
    assert trainer(tmp_path, dreaming()).step == steps
    change_tensors(path, without("carried."))
    assert trainer(tmp_path, dreaming()).step == steps  # the next step dreams anew


# ---- files beside -----------------------------------------------------------------------------------------------------------


def test_a_best_that_is_no_text_is_written_anew(tmp_path: Path) -> None:
    best = saved(tmp_path).with_name("best.json")
    text = best.read_bytes()
    best.write_bytes(b"\xff\xfe")
    trainer(tmp_path)
    assert best.read_bytes() == text
