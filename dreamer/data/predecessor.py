"""Latents that this project's predecessor wrote, converted once into a latent store::

    <root>/episode_00000/latents.pt   (T, N, Z): what Cosmos CV8x8x8 gave, not normalised
                         actions.pt   (F, A) or (F,), or a dictionary with a tensor for each component of the action
                         rewards.pt   (F,)
                         info.pt      num_frames = F; may be missing
           episode_00001/...

A row of actions or rewards leads from its frame to the next one; there may be one row fewer than frames. A latent step keeps all 8 of its
actions. Where there are only T rows, somebody has subsampled them: then a latent step has one action, that of its last frame.

Nothing here tells which weights made the latents: the store's ``tokenizer_fingerprint`` is ``UNKNOWN_TOKENIZER``, which fits no tokenizer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from dreamer.data.actions import as_action_space
from dreamer.data.alignment import chunk_actions, chunk_rewards, episode_from_steps, episode_from_transitions, num_latent_steps
from dreamer.data.files import fsync_path
from dreamer.data.readers.files import refuse
from dreamer.data.shards import STORE_FILE
from dreamer.data.store import LatentStore, LatentWriter
from dreamer.ops.minecraft import MINERL
from dreamer.types import ActionSpace, Episode

UNKNOWN_TOKENIZER = "unknown: converted from the predecessor's latents.pt"
CONVERTED = "latent_store"  # where open_latents puts the store, below the folder
STRIDE, CHUNK, OVERLAP = 8, 64, 8  # frames: of a latent step, of what was encoded at once, and shared by two of these
FRAMES_PER_SECOND = 20.0
MAX_BYTES = 2 << 30  # of a file, unpacked


def open_latents(path: Path | str) -> LatentStore:
    """The latent store at ``path``. A folder of the predecessor's is converted first, once, into ``path/latent_store``; a warning says so.

    Raises ``ValueError`` as ``LatentStore`` and ``convert_predecessor`` do, and if the folder changed since it was converted.
    """
    path = Path(path)
    if (path / STORE_FILE).exists() or not any(path.glob("episode_*/latents.pt")):
        return LatentStore(path)
    out = path / CONVERTED
    if out.exists():
        store = LatentStore(out)
        if store.extra.get("files") != _fingerprint(_folders(path)):
            raise ValueError(f"{path}: its episodes changed since {out} was made from them; remove {out} to convert them again")
        return store
    warnings.warn(
        f"{path}: converted into {out}. Nothing tells which tokenizer weights made these latents: a world model can learn from them, but "
        "no tokenizer is known to encode for it or to decode what it dreams",
        stacklevel=3,
    )
    return convert_predecessor(path, out)


def convert_predecessor(path: Path | str, out: Path | str, *, action_space: ActionSpace | str | Sequence[Any] | None = None) -> LatentStore:
    """Write the episodes below ``path`` as a latent store at ``out``, which appears whole or not at all.

    action_space: as ``as_action_space`` takes it. By default ``MINERL``, as ``keyboard`` (F, 8) and ``camera`` (F,) or as nine columns;
    a tensor (F,) of zeros, which the predecessor wrote where it found no actions, then stands for unknown ones.
    Raises ``ValueError`` naming the file for anything missing, unreadable, of another shape or length, or NaN, and if ``out`` exists.
    """
    path, out = Path(path), Path(out)
    folders = _folders(path)
    if not folders:
        raise ValueError(f"{path}: no episodes here; expected folders episode_* that hold latents.pt, actions.pt and rewards.pt")
    if out.exists():
        raise ValueError(f"{out}: exists already; convert into another folder, or remove it")
    space = None if action_space is None else as_action_space(action_space)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _write(folders, partial, space)
        try:
            partial.rename(out)
        except OSError:
            if not (out / STORE_FILE).exists():  # else another process was faster, with the same
                raise
        fsync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return LatentStore(out)


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.glob("episode_*") if folder.is_dir())


def _fingerprint(folders: Sequence[Path]) -> str:
    """Hash of all files by the checksums that torch.save keeps in them."""
    digest = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.glob("*.pt"))):
        digest.update(f"{file.parent.name}/{file.name} {[entry.CRC for entry in _entries(file)]}".encode())
    return digest.hexdigest()[:32]


def _write(folders: Sequence[Path], out: Path, space: ActionSpace | None) -> None:
    first = _read(folders[0], space)
    shape, dtype, stride = first.latents.shape[1:], first.latents.dtype, first.stride
    side = math.isqrt(shape[0])
    if side * side != shape[0]:
        refuse(folders[0] / "latents.pt", f"{shape[0]} tokens a step", "a square number of them")
    fingerprint = _fingerprint(folders)
    writer = LatentWriter(
        out,
        action_space=MINERL if space is None else space,
        tokenizer_fingerprint=UNKNOWN_TOKENIZER,
        token_grid=(side, side),
        latent_channels=shape[1],
        temporal_stride=STRIDE,
        source_fingerprint=fingerprint,
        dtype="float16" if dtype == np.float16 else "float32",
        actions_per_step=stride,
        extra={"frames_per_second": FRAMES_PER_SECOND, "converted_from": "predecessor", "files": fingerprint, "is_normalized": False},
    )
    with writer:
        for folder in folders:
            episode = _read(folder, space)
            got = (episode.latents.shape[1:], episode.latents.dtype, episode.stride)
            if got != (shape, dtype, stride):
                expected = f"{shape} of {dtype} with {stride}, as in {folders[0].name}"
                refuse(folder, f"latent steps {got[0]} of {got[1]} with {got[2]} actions each", expected)
            writer.add(
                episode.latents.astype(np.float32),
                *chunk_actions(episode.rows.actions, episode.rows.action_mask, stride),
                chunk_rewards(episode.rows.rewards, stride),
                np.zeros(len(episode.latents), bool),
            )


@dataclass(frozen=True)
class _Recording:
    latents: Float[np.ndarray, "T N Z"]
    rows: Episode  # its frames are blank: of frames (stride 8), or of latent steps (stride 1)
    stride: int


def _read(folder: Path, space: ActionSpace | None) -> _Recording:
    file = folder / "latents.pt"
    latents = _array(_load(file), file)
    if latents.ndim != 3 or latents.dtype.kind != "f" or not latents.size:
        refuse(file, f"{latents.dtype} {latents.shape}", "floating-point latents (T, N, Z), such as (T, 16, 16)")
    actions, is_known = _columns(folder / "actions.pt", space)
    rewards = _array(_load(folder / "rewards.pt"), folder / "rewards.pt")
    if rewards.shape != (len(actions),):
        refuse(folder / "rewards.pt", f"shape {rewards.shape}", f"({len(actions)},), one reward for each row of actions.pt")
    stride, num_rows = 1, len(actions)
    if len(actions) != len(latents):
        stride, (num_rows, steps) = STRIDE, _frames(folder, len(latents), len(actions))
        latents, actions, rewards = latents[steps], actions[:num_rows], rewards[:num_rows]
    blank = np.zeros((num_rows, 1, 1, 1), np.uint8)  # time is shifted in one place, which wants frames
    if len(actions) == num_rows:
        rows = episode_from_steps(blank, actions, rewards)
    else:
        rows = episode_from_transitions(blank, actions, rewards, terminated=False)
    return _Recording(latents, dataclasses.replace(rows, action_mask=rows.action_mask & is_known), stride)


def _frames(folder: Path, num_steps: int, num_rows: int) -> tuple[int, Bool[np.ndarray, " T"]]:
    """How many frames the latent steps stand for, and which steps to keep. Raises ``ValueError`` if they fit no number of frames.

    Its encoder may have left out the last frames where they filled no step: these are dropped. Or it filled them up: then the last step
    of each piece of 64 frames is repeated, in full, by the next piece, which began 8 frames earlier.
    """
    told = _load(folder / "info.pt") if (folder / "info.pt").exists() else {}
    told = told.get("num_frames") if isinstance(told, dict) else None
    if told is not None and (type(told) is not int or told - num_rows not in (0, 1)):
        refuse(folder / "info.pt", f"num_frames = {told!r}", f"{num_rows} or {num_rows + 1}, beside {num_rows} actions")
    for num_frames in (num_rows, num_rows + 1) if told is None else (told,):
        is_new = _new_steps(num_frames)
        if num_steps == len(is_new):
            return num_frames, is_new
        if num_steps == num_latent_steps(num_frames, STRIDE):
            return num_frames, np.ones(num_steps, bool)
        if num_steps == 1 + (num_frames - 1) // STRIDE:
            return 1 + STRIDE * (num_steps - 1), np.ones(num_steps, bool)
    expected = f"{num_latent_steps(num_rows, STRIDE)} of both (subsampled), or 1 + ceil((F - 1) / {STRIDE}) latent steps for F frames"
    refuse(folder, f"{num_steps} latent steps beside {num_rows} actions", expected)


def _new_steps(num_frames: int) -> Bool[np.ndarray, " T"]:
    """Of the latent steps of an episode that was encoded in overlapping pieces: which of them no later piece repeats."""
    is_new: list[bool] = []
    start = 0
    while True:
        stop = min(start + CHUNK, num_frames)
        count = num_latent_steps(stop - start, STRIDE) - (start > 0)  # a later piece's first step was left out
        is_new += [True] * (count - 1) + [stop == num_frames]
        if stop == num_frames:
            return np.array(is_new)
        start = stop - OVERLAP


def _columns(file: Path, space: ActionSpace | None) -> tuple[Float32[np.ndarray, "R A"], bool]:
    """The actions as columns of ``space`` (None: of ``MINERL``), and whether they are known."""
    value = _load(file)
    if isinstance(value, dict):
        names = [component.name for component in (space or MINERL).components]
        if set(value) != set(names):
            refuse(file, f"the actions {sorted(map(str, value))}", f"{sorted(names)}, or the action_space that they belong to")
        arrays = [_array(value[name], file) for name in names]
    else:
        arrays = [_array(value, file)]
        if space is None and arrays[0].ndim == 1 and not arrays[0].any():
            return np.zeros((len(arrays[0]), MINERL.num_columns), np.float32), False
    arrays = [array[:, None] if array.ndim == 1 else array for array in arrays]
    if any(array.ndim != 2 or len(array) != len(arrays[0]) or not array.size for array in arrays):
        refuse(file, f"shapes {[array.shape for array in arrays]}", "one row of actions for each frame")
    columns = np.concatenate(arrays, 1).astype(np.float32)
    if space is None and columns.shape[1] != MINERL.num_columns:
        refuse(
            file,
            f"{columns.shape[1]} columns",
            f"MineRL's {MINERL.num_columns}, or action_space given to convert_predecessor",
        )
    (space or MINERL).validate(columns, str(file))
    return columns, True


def _entries(file: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except Exception as error:  # zipfile raises half a dozen kinds for damage
        raise ValueError(f"{file}: cannot be read ({error}); expected what torch.save wrote") from error


def _load(file: Path) -> Any:
    """What torch.save wrote: tensors, numbers and text in containers; nothing else is ever loaded."""
    if (size := sum(entry.file_size for entry in _entries(file))) > MAX_BYTES:
        raise ValueError(f"{file}: it unpacks to {size} bytes, more than {MAX_BYTES}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # its unpickler raises many kinds, and advises to load everything; all mean that this is no such file
        raise ValueError(
            f"{file}: cannot be read ({type(error).__name__}); expected nothing but tensors, as torch.save writes them"
        ) from error


def _array(value: Any, file: Path) -> np.ndarray:
    """A tensor of plain numbers. bfloat16, which NumPy does not know, becomes float32."""
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or value.is_complex()
        or value.ndim == 0
    ):
        refuse(file, type(value).__name__, "a tensor of numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        refuse(file, f"a tensor {tuple(value.shape)} of {value.untyped_storage().nbytes()} bytes", "as many numbers as its shape promises")
    if not value.isfinite().all():
        refuse(file, "NaN or infinity", "finite numbers")
    return (value.float() if value.dtype == torch.bfloat16 else value.detach()).numpy()
