"""Whether a checkpoint fits the training that goes on from it. What does not is refused by name: nothing is filled in or left out."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dreamer.training.checkpoint import STATE, list_checkpoints
from dreamer.training.models_io import settings_difference
from dreamer.training.optim import moments_of_each

REMEDY = "remove the folder of this checkpoint to use an earlier one, or use another run_dir to start anew"
# Settings that decide what is written and when, not how the weights come out: they may change when a run goes on.
HARMLESS = {"log_every", "checkpoint_every", "validate_every", "compile", "activation_checkpointing", "keep_last", "keep_best"}


@runtime_checkable
class Resumable(Protocol):
    """What of a ``Trainer`` is compared: it imports this module."""

    phase: Any
    parameters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]


def check_same_settings(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """``ValueError`` naming the first setting that differs between a checkpoint and this run."""
    if difference := settings_difference(saved, now, ignored=HARMLESS):
        raise ValueError(f"{where}: was trained with {difference}; use the same setting to resume, or another run_dir to start anew")


def known_best(run_dir: Path, state: dict[str, Any], wanted: tuple[str, str] | None) -> dict[str, Any] | None:
    """The best that a checkpoint knows of, if it is still there and the same metric says so. ``wanted``: that metric and what is better."""
    best = state.get("best")
    if best is None or (best["metric"], best["better"]) != wanted:
        return None
    return best if best["step"] in dict(list_checkpoints(run_dir)) else None


def check_train_state(trainer: Resumable, checkpoint: Path, state: dict[str, Any], step: int, tensors: dict[str, Tensor]) -> None:
    """``ValueError`` unless ``tensors`` are what ``trainer`` would have saved after ``step`` steps, and ``state.json`` says so.

    They may lie in pieces, or be without content (device meta): then only their values go unseen.
    """
    if fault := _numbers_fault(state, step):
        raise ValueError(f"{checkpoint / 'state.json'}: {fault}; {REMEDY}")
    moments = {
        parameter: {f"optimizer.{name}": like for name, like in own.items()}
        for parameter, own in moments_of_each(trainer.optimizers, trainer.parameters).items()
    }
    expected = {f"phase.{name}": t for name, t in trainer.phase.state_dict().items()}
    expected |= {f"ema.{name}": t for name, t in trainer.ema.items()}
    expected |= {name: like for own in moments.values() for name, like in own.items()}
    carried = {name.removeprefix("carried."): t for name, t in tensors.items() if name.startswith("carried.")}
    others = {name: t for name, t in tensors.items() if not name.startswith("carried.")}
    lacking = {parameter for parameter, own in moments.items() if not own.keys() & others.keys()}
    num_useful = step - state["num_skipped"]
    told = state.get("without_moments")
    of_older = lacking if num_useful == 0 or trainer.phase.leaves_out else set()  # where nothing is told
    allowed = of_older if told is None else set(told)
    absent = {name for parameter in lacking & allowed for name in moments[parameter]}
    fault = (
        _moments_fault(moments.keys(), lacking, told, num_useful)
        or _tensors_fault(others, expected, absent)
        or _counters_fault(others, num_useful)
        or next((f"'carried.{name[:200]}' is one number; expected rows" for name, t in carried.items() if t.ndim == 0), None)
    )
    if fault is None:
        try:
            trainer.phase.check_carried(carried, step)
        except ValueError as error:
            fault = str(error)
    if fault:
        where = checkpoint / STATE if (checkpoint / STATE).is_file() else checkpoint  # in pieces
        raise ValueError(f"{where}: {fault}; {REMEDY}")


def _numbers_fault(state: dict[str, Any], step: int) -> str | None:
    if state.get("step", step) != step:
        return f"is of step {reprlib.repr(state['step'])}; expected {step}, as its folder says"
    if state["num_skipped"] > step:
        return f"num_skipped is {reprlib.repr(state['num_skipped'])}; expected at most step = {step}"
    if state.get("bad_in_a_row", 0) > state["num_skipped"]:
        return f"bad_in_a_row is {reprlib.repr(state['bad_in_a_row'])}; expected at most num_skipped = {state['num_skipped']}"
    return None


def _moments_fault(parameters: Any, lacking: set[str], told: list[str] | None, num_useful: int) -> str | None:
    """Moments come with a parameter's first gradient; steps that were skipped bring none."""
    if num_useful > 0 and lacking == set(parameters):
        return f"lacks every 'optimizer.' tensor; expected those of {num_useful} steps"
    if num_useful == 0 and lacking != set(parameters):
        return "holds 'optimizer.' tensors; expected none, as every step so far was skipped"
    for name in told or ():
        if name not in lacking:
            what = f"holds 'optimizer.' tensors of {name!r}" if name in parameters else f"trains no parameter {name[:200]!r}"
            return f"{what}; expected otherwise, as state.json lists it under without_moments"
    return None


def _tensors_fault(tensors: dict[str, Tensor], expected: dict[str, Tensor], absent: set[str]) -> str | None:
    """The first name, shape or type that differs. ``absent``: what need not be there."""
    for name, like in expected.items():
        found = tensors.get(name)
        if found is None:
            if name not in absent:
                return f"lacks {name!r}; expected {kind_of(like)}"
        elif found.shape != like.shape or found.dtype != like.dtype:
            return f"{name!r} is {kind_of(found)}; expected {kind_of(like)}"
    unknown = next((name for name in tensors if name not in expected), None)
    return None if unknown is None else f"holds {unknown[:200]!r}; expected no tensor of that name"


def kind_of(tensor: Tensor) -> str:
    """Type and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _counters_fault(tensors: dict[str, Tensor], num_useful: int) -> str | None:
    for name, tensor in tensors.items():
        if name.startswith("optimizer.") and name.endswith(".step") and not tensor.is_meta:
            count = float(tensor)
            if not (1 <= count <= num_useful and count.is_integer()):
                return f"{name!r} is {count:g}; expected a number of steps from 1 to {num_useful}"
    return None
