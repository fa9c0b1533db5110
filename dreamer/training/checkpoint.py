"""Checkpoints: safetensors and JSON, no pickle. A checkpoint appears whole or not at all.

``<run>/checkpoints/step_00001000/`` holds

``model.safetensors``        the weights to use (the exponential moving average where there is one)
``model.json``               how to build the model: kind, config, action space, token grid, ...
``train_state.safetensors``  raw weights, loss normalisers, optimiser state: what resuming needs
``state.json``               step and the phase's resolved config
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamer.data.files import fsync_path

FILES = ("model.safetensors", "model.json", "train_state.safetensors", "state.json")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, oldest first. Unfinished ones have another name."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and all((path / name).is_file() for name in FILES):
            found.append((int(digits), path))
    return sorted(found)


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model_tensors: dict[str, torch.Tensor],
    model_info: dict[str, Any],
    train_tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write beside, fsync, rename; then remove all but the newest ``keep``. ``OSError`` names the folder when the disk is full."""
    final = checkpoint_path(run_dir, step)
    needed = sum(t.numel() * t.element_size() for t in (*model_tensors.values(), *train_tensors.values()))
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if free < 1.1 * needed + 1e6:
        message = f"too little disk: a checkpoint needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; free some space and run again"
        raise OSError(errno.ENOSPC, message, str(final.parent))
    for leftover in final.parent.glob(".writing_*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.with_name(f".writing_{final.name}_{os.getpid()}")
    temporary.mkdir()
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in model_tensors.items()}, temporary / "model.safetensors")
        save_file({k: v.detach().cpu().contiguous() for k, v in train_tensors.items()}, temporary / "train_state.safetensors")
        (temporary / "model.json").write_text(json.dumps(model_info, indent=1))
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}, indent=1))
        for name in FILES:
            fsync_path(temporary / name)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(final.parent)
    for _, old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def read_json(path: Path, remedy: str = "use an earlier checkpoint") -> dict[str, Any]:
    """A JSON object from a file; ``ValueError`` naming it if it is missing, and the remedy too if it is damaged."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this the folder of a checkpoint or of a finished run?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; expected a JSON object; {remedy}")
    return data


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint; ``ValueError`` naming the file and the remedy if it is damaged."""
    state = read_json(checkpoint / "state.json")
    for key, kind in {"settings": dict, "seed": int, "num_skipped": int}.items():
        if not isinstance(state.get(key), kind):
            raise _damaged_state(checkpoint, f"{key} is {state.get(key)!r}")
    return state


def planned_steps(checkpoint: Path, phase: str) -> int:
    """For how many steps ``phase`` was to be trained when ``checkpoint`` was written; ``ValueError`` as ``read_state``."""
    settings = read_state(checkpoint)["settings"]
    try:
        return int(settings[phase]["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        raise _damaged_state(checkpoint, f"settings.{phase}.train.steps is no number") from None


def _damaged_state(checkpoint: Path, what: str) -> ValueError:
    return ValueError(f"{checkpoint / 'state.json'}: is damaged ({what}); remove the folder of this checkpoint to use an earlier one")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors from a safetensors file; ``ValueError`` naming the file if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); use an earlier checkpoint") from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: a checkpoint's own folder, or the newest of a run."""
    if (path / "model.json").is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise ValueError(f"{path}: holds no finished checkpoint; expected a run's folder or one of its checkpoints/step_* folders")
    return found[-1][1]


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Strictly: every name and shape must fit, or ``ValueError`` names the first that does not."""
    own = module.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in tensors or name not in own:
            lacks = "lacks" if name not in tensors else "has the unknown"
            raise ValueError(f"{where}: {lacks} weight {name!r}; this checkpoint belongs to another model")
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{where}: weight {name!r} has shape {tuple(tensors[name].shape)}, the config makes {tuple(own[name].shape)}; "
                "this checkpoint was trained with another config"
            )
    module.load_state_dict(tensors)
