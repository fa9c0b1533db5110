"""Checkpoints: safetensors and JSON, no pickle. A checkpoint appears whole or not at all, and says itself whether it still is.

``<run>/checkpoints/step_00001000/`` holds

``model.safetensors``        the weights to use (the exponential moving average where there is one)
``model.json``               how to build the model: kind, config, action space, token grid, ...
``train_state.safetensors``  raw weights, loss normalisers, optimiser state: what resuming needs; where weights are trained in pieces, a
                             file a process, ``train_state_00001_of_00008.safetensors`` and so on (``sharded_state.py``)
``state.json``               step, the phase's resolved config, and what else resuming needs
``manifest.json``            size and SHA-256 of the others, written last: without it, nothing here is a checkpoint

``<run>/checkpoints/best.json`` names the best one, where ``keep_best`` says by which metric. ``interim_step_...`` was written because of
an interruption, where none was due. No checkpoint is ever overwritten, and one that is removed loses its name first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamer.data.files import atomic_file, fsync_path, read_json
from dreamer.training.distributed import Parallel
from dreamer.training.sharded_state import write_pieces
from dreamer.training.state_fields import state_fault

FILES = ("model.safetensors", "model.json", "state.json")  # and the training state, in one file or in several
STATE = "train_state.safetensors"
MANIFEST = "manifest.json"
BEST = "best.json"
FORMAT = 1
NAME = re.compile(r"(?:interim_)?step_(\d{8,})", re.ASCII)
FILE_NAME = re.compile(r"\w{1,64}\.(json|safetensors)", re.ASCII)  # of what a manifest may list

_log = logging.getLogger(__name__)
_sound: dict[Path, tuple[Any, ...]] = {}  # whose bytes this process has compared, and their stamps then
_told: set[str] = set()  # which damage this process has warned of


class OtherFormat(ValueError):
    """A checkpoint that another version of dreamer wrote: nothing here can tell whether it is damaged."""


def checkpoint_path(run_dir: Path, step: int, *, is_interim: bool = False) -> Path:
    return run_dir / "checkpoints" / f"{'interim_' if is_interim else ''}step_{step:08d}"


# ---- what is there ----------------------------------------------------------------------------------------------------------


def _folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Everything that has a checkpoint's name, oldest first. Unfinished ones and those set aside have another one."""
    found = [(path, NAME.fullmatch(path.name)) for path in (run_dir / "checkpoints").glob("*step_*")]
    return sorted((int(name[1]), path) for path, name in found if name)  # of one step, the interim one comes first: it knows less


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of the checkpoints whose files are there and as long as they should be, oldest first. Quick: it reads no weights,
    so a flipped byte goes unseen; what learns from a checkpoint takes ``newest_checkpoint``."""
    return [(step, path) for step, path in _folders(run_dir) if find_damage(path, in_full=False) is None]


def newest_checkpoint(run_dir: Path, *, set_aside: bool = False) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that is sound to the last byte; None where there is none at all.

    Damaged ones that are newer are passed over with a warning. ``set_aside``: they are renamed too, to ``damaged_step_...``, so that
    training can go on from the older one and write that step again. Raises ``ValueError`` if all are damaged: to begin anew must be
    somebody's wish; and ``OtherFormat``, before anything is renamed, for one of another version of dreamer.
    """
    damaged: list[tuple[Path, str]] = []
    for step, path in reversed(_folders(run_dir)):
        what = find_damage(path)
        if what is None:
            for other, told in damaged:
                place = f"; it is now {_set_aside(other)}" if set_aside else ""
                _warn_once(f"{told}: this checkpoint is damaged, and {path.name} is used in its place{place}")
            return step, path
        damaged.append((path, what))
    if damaged:
        raise ValueError(
            f"{damaged[0][0].parent}: none of {len(damaged)} checkpoints is sound; the newest: {damaged[0][1]}. Restore one, or move the "
            "folder away to begin anew"
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: a checkpoint's own folder, or the newest sound one of a run.

    Raises ``ValueError`` if there is none, and for a damaged one that was named itself.
    """
    if (path / MANIFEST).is_file() or any((path / name).is_file() for name in FILES):
        if what := find_damage(path):
            raise ValueError(f"{what}: this checkpoint is damaged; use another one")
        return path
    found = newest_checkpoint(path)
    if found is None:
        raise ValueError(f"{path}: holds no finished checkpoint; expected a run's folder or one of its checkpoints/step_* folders")
    return found[1]


def find_damage(checkpoint: Path, *, in_full: bool = True) -> str | None:
    """Which file is damaged, and how; None if all is as the manifest says. ``in_full``: to the last byte, which is done once a process for
    the same files; else their sizes are compared. Raises ``OtherFormat``, which is no damage."""
    try:
        manifest = read_manifest(checkpoint)
    except OtherFormat:
        raise
    except OSError as error:
        return _unreadable(checkpoint / MANIFEST, error)
    except ValueError as error:
        return _unreadable(checkpoint / MANIFEST, error.__cause__) if isinstance(error.__cause__, OSError) else str(error)
    stamps = []
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        try:
            found = file.stat()
        except FileNotFoundError:
            return f"{file}: is missing"
        except OSError as error:
            return _unreadable(file, error)
        if found.st_size != entry["bytes"]:
            return f"{file}: has {found.st_size} bytes, expected {str(entry['bytes'])[:20]}"
        stamps.append((name, entry["sha256"], found.st_ino, found.st_size, found.st_mtime_ns))
    if not in_full or _sound.get(checkpoint.absolute()) == tuple(stamps):
        return None
    for name, entry in manifest["files"].items():
        try:
            is_same = _sha256(checkpoint / name) == entry["sha256"]
        except OSError as error:
            return _unreadable(checkpoint / name, error)
        if not is_same:
            return f"{checkpoint / name}: its SHA-256 differs from the one in {MANIFEST}"
    _sound[checkpoint.absolute()] = tuple(stamps)
    return None


def _unreadable(file: Path, error: OSError) -> str:
    """The damage that ``error`` means; raises it where it tells of the machine, not of the file."""
    if error.errno != errno.EIO:
        raise error
    return f"{file}: cannot be read ({error.strerror})"


def _is_file(path: Path) -> bool:
    """As ``Path.is_file``, which takes every fault of the machine for a file that is missing."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """``manifest.json``: format, step, and bytes and sha256 of each file. Raises ``ValueError`` if it is missing or
    damaged, and ``OtherFormat`` if it is of a format that is not known here."""
    if not _is_file(checkpoint / MANIFEST):
        raise ValueError(f"{checkpoint / MANIFEST}: is missing; this checkpoint was made before manifests existed, or it is damaged")
    manifest = read_json(checkpoint / MANIFEST, "it cannot say whether the others are whole")
    files, found = manifest.get("files"), manifest.get("format")
    if type(found) is int and found != FORMAT:
        remedy = f"this version of dreamer knows format {FORMAT}; use the version that wrote this checkpoint"
        raise OtherFormat(f"{checkpoint / MANIFEST}: is of format {str(found)[:20]}; {remedy}")
    is_known = type(found) is int and type(manifest.get("step")) is int
    if not is_known or not isinstance(files, dict) or not files.keys() >= set(FILES) or not any(n.startswith("train_state") for n in files):
        raise ValueError(f"{checkpoint / MANIFEST}: does not list the files of a checkpoint of format {FORMAT}")
    for name, entry in files.items():
        is_plain = FILE_NAME.fullmatch(name) and isinstance(entry, dict)
        if not is_plain or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{checkpoint / MANIFEST}: its entry {name[:80]!r} is not understood")
    name = NAME.fullmatch(checkpoint.name)
    if name and int(name[1]) != manifest["step"]:
        raise ValueError(f"{checkpoint / MANIFEST}: is of step {str(manifest['step'])[:20]}")
    return manifest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        _log.warning("%s", message)


def _set_aside(damaged: Path) -> Path:
    """Another name for a damaged checkpoint, that nothing looks at and nothing removes."""
    names = (f"damaged_{damaged.name}" + (f"_{n}" if n else "") for n in range(1000))
    place = next(damaged.with_name(name) for name in names if not damaged.with_name(name).exists())
    damaged.rename(place)
    fsync_path(place.parent)
    return place


# ---- writing ----------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model_tensors: dict[str, torch.Tensor],
    model_info: dict[str, Any],
    train_tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep_last: int = 2,
    best: dict[str, Any] | None = None,
    is_interim: bool = False,
    parallel: Parallel | None = None,
) -> Path:
    """Write beside, fsync, rename; then keep what ``tidy_checkpoints`` keeps.

    ``is_interim``: it goes once another one is there of this step or a later one. Raises ``OSError`` naming the folder,
    and leaves what was there, if the disk is full or read-only, and if there is a checkpoint of this step already.

    Of several processes, all of which call this, the main one writes; with fsdp, each writes its pieces of ``train_tensors`` before.
    """
    parallel = parallel or Parallel()
    final, in_pieces = checkpoint_path(run_dir, step, is_interim=is_interim), parallel.strategy == "fsdp"
    num_bytes = sum(t.numel() * t.element_size() for t in (*model_tensors.values(), *train_tensors.values()))
    temporary = None
    try:
        temporary = parallel.main_does(lambda: _begin(final, num_bytes))
        own = write_pieces(temporary, train_tensors, parallel.ranks) if in_pieces else []
        pieces = parallel.gathered({file.name: _entry(file) for file in own})
        tensors = {"model.safetensors": model_tensors} | ({} if in_pieces else {STATE: train_tensors})
        texts = {"model.json": model_info, "state.json": state | {"step": step}}
        manifest = {"format": FORMAT, "step": step, "files": pieces}
        parallel.main_does(lambda: _finish(temporary, final, tensors, texts, manifest))
    except (OSError, SafetensorError) as error:
        raise _write_fault(error, final) from error
    finally:
        if temporary is not None and parallel.ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    parallel.main_does(lambda: tidy_checkpoints(run_dir, keep_last=keep_last, best=best))
    return final


def _begin(final: Path, num_bytes: int) -> Path:
    """An empty folder to write into, beside ``final``."""
    final.parent.mkdir(parents=True, exist_ok=True)
    fsync_path(final.parent.parent)
    _require_room(final, num_bytes)
    _sweep(final.parent)
    temporary = final.with_name(f".writing_{final.name}_{os.getpid()}")
    temporary.mkdir()
    return temporary


def _finish(
    temporary: Path, final: Path, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Write the other files, the manifest last, and give the folder its name."""
    for name, values in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, temporary / name)
    for name, value in texts.items():
        (temporary / name).write_text(json.dumps(value, indent=1))
    for name in (*tensors, *texts):
        fsync_path(temporary / name)
    files = manifest["files"] | {name: _entry(temporary / name) for name in (*tensors, *texts)}
    (temporary / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1))
    fsync_path(temporary / MANIFEST)
    fsync_path(temporary)
    temporary.rename(final)  # fails where a checkpoint has this name
    fsync_path(final.parent)


def _entry(file: Path) -> dict[str, Any]:
    """A file in the manifest."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def tidy_checkpoints(run_dir: Path, *, keep_last: int, best: dict[str, Any] | None = None) -> None:
    """Remove what killed processes left, name the best in ``best.json``, and keep the newest ``keep_last``, the best, and an interim one
    while it is the newest. ``best``: its step, and which metric said so. Changes nothing that is as it should be."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return
    _sweep(folder)
    if best is None:
        if (folder / BEST).exists():  # to ask first: a read-only folder refuses the rest, even if there is nothing to do
            (folder / BEST).unlink()
    elif not (folder / BEST).is_file() or (folder / BEST).read_bytes() != json.dumps(best).encode():
        with atomic_file(folder / BEST) as tmp:
            tmp.write_text(json.dumps(best))
    found = list_checkpoints(run_dir)
    planned = [(step, path) for step, path in found if path.name.startswith("step_")]
    kept = [*planned[-keep_last:], *found[-1:], *(each for each in planned if best and each[0] == best["step"])]
    for step, path in found:
        if (step, path) not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Its name goes first: half of it must never look like a damaged one."""
    doomed = checkpoint.with_name(f".removing_{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sweep(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for leftover in (*folder.glob(".writing_*"), *folder.glob(".removing_*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(f".{BEST}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _require_room(final: Path, num_bytes: int) -> None:
    """``OSError`` before anything is written if it does not fit, or if this step is there already."""
    if final.exists():
        raise FileExistsError(errno.EEXIST, "is there already; does another process train in this folder?", str(final))
    free = shutil.disk_usage(final.parent).free
    if free < 1.1 * num_bytes + 1e6:
        message = f"too little disk: a checkpoint needs {num_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(final.parent))


def _write_fault(error: OSError | SafetensorError, final: Path) -> OSError:
    """The same fault with the folder and the remedy. safetensors tells the number of a fault of the machine in words alone."""
    if isinstance(error, OSError):
        number, words = error.errno or errno.EIO, error.strerror or str(error)
    else:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        words = os.strerror(number) if found else str(error)
    remedy = "free some space and run again" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that and run again"
    return OSError(number, f"this checkpoint was not written ({words}); older ones are as they were: {remedy}", str(final))


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint; ``ValueError`` naming the file and the remedy if it is damaged."""
    state = read_json(checkpoint / "state.json")
    if fault := state_fault(state):
        raise _damaged_state(checkpoint, fault)
    return state


def planned_steps(checkpoint: Path, phase: str) -> int:
    """For how many steps ``phase`` was to be trained when ``checkpoint`` was written; ``ValueError`` as ``read_state``."""
    settings = read_state(checkpoint)["settings"]
    try:
        steps = settings[phase]["train"]["steps"]
    except (KeyError, TypeError, IndexError):
        steps = None
    if type(steps) is not int or steps < 1:
        raise _damaged_state(checkpoint, f"settings.{phase}.train.steps is no number of steps")
    return steps


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


def load_weights(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Strictly: every name and shape must fit, or ``ValueError`` names the first that does not."""
    own = module.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in tensors or name not in own:
            lacks = "lacks" if name not in tensors else "has the unknown"
            raise ValueError(f"{where}: {lacks} weight {name[:200]!r}; this checkpoint belongs to another model")
        if own[name].shape != tensors[name].shape:
            raise ValueError(
                f"{where}: weight {name!r} has shape {tuple(tensors[name].shape)}, the config makes {tuple(own[name].shape)}; "
                "this checkpoint was trained with another config"
            )
    module.load_state_dict(tensors)
