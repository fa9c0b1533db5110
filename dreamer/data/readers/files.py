"""Files of arrays and of JSON from elsewhere, read with care: nothing is unpickled, sizes are bounded, errors name the file.

Every function here raises ``ValueError`` that begins with the file's path, whatever is wrong with it.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import numpy as np

from dreamer.data.files import MAX_JSON_BYTES

T = TypeVar("T")

MAX_NPZ_BYTES = 2 << 30  # unpacked

REMEDY = "Repair the recording or move it away"


def first_readable(read: Callable[[Path], T], recordings: Sequence[Path]) -> T:
    """What ``read`` gives for the first recording that it can read: one that is broken must not hide the others. If all are, its first
    ``ValueError``."""
    first: ValueError | None = None
    for recording in recordings:
        try:
            return read(recording)
        except ValueError as error:
            first = first or error
    assert first is not None  # a reader's ``find`` raises where there are no recordings
    raise first


def refuse(file: Path, got: object, expected: str) -> NoReturn:
    """Raise the ``ValueError`` that says what was found and what to do about it."""
    raise ValueError(f"{file}: got {got}; expected {expected}. {REMEDY}")


def load_npy(file: Path) -> np.ndarray:
    """The array of a .npy file."""
    try:
        with file.open("rb") as stream:
            _read_header(stream, file.stat().st_size)
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy's parsers raise a dozen kinds, tokenize's among them; all mean a broken file
        raise ValueError(f"{file}: cannot be read ({error}); expected an array that numpy.save wrote. {REMEDY}") from error
    if not isinstance(array, np.ndarray):
        refuse(file, type(array).__name__, "one array")
    return array


def npz_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a .npz file, from the headers alone."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            if (size := sum(entry.file_size for entry in entries)) > MAX_NPZ_BYTES:
                raise ValueError(f"it unpacks to {size} bytes, more than {MAX_NPZ_BYTES}")
            shapes = {}
            for entry in entries:
                with archive.open(entry) as stream:
                    shapes[entry.filename.removesuffix(".npy")] = _read_header(stream, entry.file_size)
    except Exception as error:  # as in load_npy; zipfile adds some
        raise ValueError(f"{file}: cannot be read ({error}); expected arrays that numpy.savez wrote. {REMEDY}") from error
    return shapes


def load_npz(file: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file (only ``names``, if given), each within what its header and the file promise."""
    shapes = npz_shapes(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in (shapes if names is None else names)}
    except Exception as error:  # as in load_npy
        raise ValueError(f"{file}: cannot be read ({error}); expected arrays that numpy.savez wrote. {REMEDY}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.shape != shapes[name]:
            refuse(file, f"{name} of {type(array).__name__}", "an array as its header says")
    return arrays


def _read_header(stream: IO[bytes] | io.BufferedIOBase, num_bytes: int) -> tuple[int, ...]:
    """The shape that a .npy header promises, which the bytes behind it must be able to hold: else memory is asked for in vain."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is not supported")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize > num_bytes:
        raise ValueError(f"its header promises {dtype} {shape}, more than its {num_bytes} bytes can hold")
    return shape


def load_json(file: Path) -> Any:
    """The value of a JSON file; NaN and infinity are no JSON."""
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
        return _parse(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); expected JSON. {REMEDY}") from error


def load_jsonl(file: Path, max_rows: int) -> list[Any]:
    """The values of a file with one JSON value a line, at most ``max_rows``. A cut line is an error that names it."""
    rows: list[Any] = []
    try:
        with file.open("rb") as stream:
            while line := stream.readline(MAX_JSON_BYTES + 1):
                if line.isspace() and not stream.read(MAX_JSON_BYTES).strip():  # empty lines at the end are nothing
                    break
                if len(rows) == max_rows:
                    raise ValueError(f"more than {max_rows} lines; cut it, or raise max_frames")
                rows.append(_parse(line))
    except (OSError, ValueError, RecursionError) as error:
        remedy = "remove this line and those behind it, or move the recording away"
        raise ValueError(f"{file}: line {len(rows) + 1} cannot be read ({error}); {remedy}") from error
    return rows


def _parse(text: bytes) -> Any:
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
    return json.loads(text.decode(), parse_constant=_no_number, parse_float=_finite)


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large")
    return value
