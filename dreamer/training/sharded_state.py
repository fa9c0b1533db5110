"""Training state in pieces: each process writes its own and reads what it needs, whoever wrote it and with how many processes.

PyTorch's distributed checkpoint (DCP) plans who holds what; the pieces are safetensors files, which say in their header where they belong.
Nothing is pickled: the reader that DCP takes by itself unpickles a file ``.metadata``, and is used nowhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dreamer.data.files import fsync_path
from dreamer.training.distributed import Ranks

UNREADABLE = (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError)


def write_pieces(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[Path]:
    """Write ``tensors``, together with the other processes; returns this process's files (none where it has no piece). ``OSError`` if a
    process fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DCP's own calls
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise OSError(f"{folder}: a piece of the training state cannot be written ({_first(error)})") from error
    own = folder / f"shard-{ranks.rank + 1:05d}-model-00001-of-00001.safetensors"  # as DCP names it
    if not own.exists():
        return []
    piece = own.rename(folder / piece_name(ranks))
    fsync_path(piece)  # DCP does so before Python has written its buffer
    return [piece]


def piece_name(ranks: Ranks) -> str:
    return f"train_state_{ranks.rank + 1:05d}_of_{ranks.world:05d}.safetensors"


def saved_shapes(checkpoint: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """A checkpoint's tensors with these prefixes, whether in pieces or in one file: whole, and without content (device meta). Raises
    ``ValueError`` naming the folder if a piece is missing or damaged."""
    try:
        found = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except UNREADABLE as error:
        raise ValueError(f"{checkpoint}: its training state is not readable ({_first(error)}); use an earlier checkpoint") from error
    hollow: dict[str, Tensor] = {}
    for name, entry in found.items():
        if not name.startswith(prefixes):
            continue
        size, chunks, dtype = entry.size, entry.chunks, entry.properties.dtype  # pyright: ignore[reportAttributeAccessIssue]
        if not _fit_together(size, chunks):
            raise ValueError(f"{checkpoint}: the pieces of {name[:200]!r} do not fit together; use an earlier checkpoint")
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):  # DCP would leave a gap as it is
            raise ValueError(f"{checkpoint}: a piece of {name[:200]!r} is missing; use an earlier checkpoint")
        hollow[name] = torch.empty(size, dtype=dtype, device="meta")
    return hollow


def _fit_together(size: torch.Size, chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether all pieces lie within a tensor of this size, and no two have a number in common."""
    boxes = sorted([(at, at + n) for at, n in zip(c.offsets, c.sizes, strict=False)] for c in chunks if math.prod(c.sizes))
    for i, box in enumerate(boxes):
        if len(box) != len(size) or any(not 0 <= first < end <= whole for (first, end), whole in zip(box, size, strict=True)):
            return False
        for other in boxes[i + 1 :]:
            if box and other and other[0][0] >= box[0][1]:  # sorted: so are those that follow
                break
            if all(first < end_ and first_ < end for (first, end), (first_, end_) in zip(box, other, strict=False)):
                return False
    return all(len(c.offsets) == len(c.sizes) == len(size) for c in chunks)


def read_pieces(checkpoint: Path, targets: dict[str, Tensor]) -> None:
    """Fill ``targets``, or this process's pieces of them, together with the other processes. Raises ``ValueError`` naming the folder if
    something is missing, damaged or of another shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no other processes, where there are none
            load(dict(targets), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: its training state cannot be read ({_first(error)}); use an earlier checkpoint") from error


def _first(error: BaseException) -> str:
    """What went wrong in the first process in which something did."""
    failures = getattr(error, "failures", None)
    return repr(failures[min(failures)][0] if failures else error)[:300]  # names of any length stand in a file
