"""Tensors and source text of a TorchScript archive, read without running anything that is in it.

``torch.jit.load`` compiles the code of an archive. Only its tensors are wanted here, and those need no code: an archive is a zip file
with ``<name>/data.pkl``, a pickle of nested module objects, and the bytes of their tensors in ``<name>/data/0``, ``1``, ... The
unpickler below knows tensors, containers and stand-ins without behaviour for the modules; whatever else a pickle asks for is an error.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 1 << 22  # data.pkl holds names and shapes only: some kB
MAX_CODE_BYTES = 1 << 26  # so does code/

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor attribute of the archive's modules on the CPU, under its dotted name: those of ``torch.jit.load(path).state_dict()``.

    Nothing of the archive is executed. Raises ``ValueError`` naming the file if it is missing, cut off, damaged, or no TorchScript archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") == 1]
            if len(pickles) != 1 or archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
                raise ValueError("holds no data.pkl of a TorchScript module")
            root = _Unpickler(archive, pickles[0].removesuffix("data.pkl")).load()
        if not isinstance(root, _Module):
            raise ValueError(f"data.pkl holds a {type(root).__name__}, not a TorchScript module")
        return _named_tensors(root)
    except Exception as error:  # a damaged or a hostile archive can raise nearly anything
        raise ValueError(
            f"{path}: not a readable TorchScript archive ({_starts_like(path)}{error}); "
            "get the file again, and compare its size with the one on its download page"
        ) from error


def read_torchscript_code(path: Path) -> str:
    """The source text of the archive's modules, one after the other; nothing of it is compiled. Raises ``ValueError`` naming the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = [entry for entry in archive.infolist() if re.fullmatch(r"[^/]+/code/.+\.py", entry.filename)]
            if sum(entry.file_size for entry in files) > MAX_CODE_BYTES:
                raise ValueError(f"its code is longer than {MAX_CODE_BYTES} bytes")
            return "\n".join(archive.read(entry).decode() for entry in files)
    except Exception as error:  # as above
        raise ValueError(f"{path}: the code in this TorchScript archive cannot be read ({error}); get the file again") from error


def require_small_archive(path: Path, max_bytes: int) -> None:
    """Raise ``ValueError`` if what ``torch.save`` wrote is no zip file, or unpacks to more than ``max_bytes``."""
    with zipfile.ZipFile(path) as archive:
        if (size := sum(entry.file_size for entry in archive.infolist())) > max_bytes:
            raise ValueError(f"it unpacks to {size} bytes, more than {max_bytes}")


def _starts_like(path: Path) -> str:
    """What the usual mistakes look like, in words."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer that git leaves in place of a large file, run git lfs pull or use hf download: "
    return "" if start[:2] == b"PK" else f"it is no zip file, it starts with {start[:16]!r}: "


class _Module:
    """Stands for an object of a TorchScript class: its attributes, no behaviour."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError("a module's state is no dict of names")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    """Reads ``data.pkl``. What ``find_class`` returns is all that a pickle can call."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        data = archive.read(f"{prefix}data.pkl")
        for opcode, argument, _ in pickletools.genops(data):  # Python's unpickler makes room up to the highest place that is named
            if opcode.name in ("PUT", "LONG_BINPUT") and argument is not None and argument > len(data):
                raise pickle.UnpicklingError(f"keeps a value at place {argument} in {len(data)} bytes")
        super().__init__(io.BytesIO(data))
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("collections", "OrderedDict"): dict,
            ("torch", "device"): str,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): self._untagged,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which no weights need")
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> Tensor:
        """The flat values of a storage."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(length)):
                pass
            case _:
                raise pickle.UnpicklingError(f"unknown kind of stored object: {str(pid)[:60]}")
        if key not in self._storages:
            entry = self._archive.getinfo(f"{self._prefix}data/{key}")
            # compressed, a few bytes could claim all memory; PyTorch writes storages as they are
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != length * dtype.itemsize:
                raise pickle.UnpicklingError(f"{entry.filename} has {entry.file_size} bytes; {length} values of {dtype} were announced")
            data = bytearray(self._archive.read(entry))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _tensor(self, storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return storage.as_strided(shape, stride, offset)  # raises if it would reach outside of the storage

    def _untagged(self, value: Any, _type: str) -> Any:
        return value


def _named_tensors(root: _Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, _Module]] = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            raise ValueError(f"the module {prefix.removesuffix('.')!r} occurs twice")
        seen.add(id(module))
        for name, value in getattr(module, "attributes", {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
    return found
