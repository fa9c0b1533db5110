"""Recording formats, one file each. A new format is a class with ``Reader``'s methods and one line in ``READERS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dreamer.data.readers.minari import MinariReader
from dreamer.data.readers.minerl import MineRLReader
from dreamer.data.readers.npy import NpyReader
from dreamer.data.readers.video import SUFFIXES, VideoReader
from dreamer.data.readers.vpt import VPTReader
from dreamer.types import Reader

READERS: dict[str, Callable[..., Reader]] = {
    "minari": MinariReader,
    "minerl": MineRLReader,
    "npy": NpyReader,
    "video": VideoReader,
    "vpt": VPTReader,
}

# Names of files by which a format is known, the most telling first.
SIGNS = {
    "minerl": ("rendered.npz",),
    "npy": ("frames.npy",),
    "minari": ("main_data.hdf5", "part-0.arrow", "part-0.parquet"),
    "vpt": ("*.mp4", "*.jsonl"),  # both halves of one recording
    "video": tuple(f"*{suffix}" for suffix in sorted(SUFFIXES)),
}


def make_reader(name: str, path: Path | str, /, **options: Any) -> Reader:
    """The reader ``name`` for the recordings at ``path``. Raises ``ValueError`` for an unknown name or option, with the nearest, and
    for an option of another type."""
    if name not in READERS:
        raise ValueError(f"no reader is called {name!r}; expected one of {sorted(READERS)}.{_nearest(name, READERS)}")
    known = list(inspect.signature(READERS[name]).parameters)[1:]  # the first is the path
    types = get_type_hints(READERS[name].__init__ if isinstance(READERS[name], type) else READERS[name])
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"the reader {name!r} has no option {option!r}; expected {', '.join(known)}.{_nearest(option, known)}")
        try:
            adapter = TypeAdapter(types.get(option, Any), config=ConfigDict(arbitrary_types_allowed=True))
            options[option] = adapter.validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"the reader {name!r}: {option} is {value!r}: {error.errors()[0]['msg']}") from None
    if not Path(path).exists():
        raise ValueError(f"{path}: does not exist")
    reader = READERS[name](path, **options)
    if not reader.frames_per_second > 0:
        raise ValueError(f"the reader {name!r}: frames_per_second is {reader.frames_per_second}; expected a positive rate")
    return reader


def guess_reader(path: Path | str) -> str:
    """The name of the reader for what lies at ``path``, by the names of the files there. Raises ``ValueError`` if none fits."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: does not exist")
    for name, patterns in SIGNS.items():
        for pattern in patterns:
            for file in [path] if path.is_file() else path.rglob(pattern):
                is_whole = name != "vpt" or all(file.with_suffix(suffix).is_file() for suffix in (".mp4", ".jsonl"))
                if file.match(pattern) and is_whole:
                    return name
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path}: is empty; expected recordings in one of the known formats ({', '.join(SIGNS)})")
    raise ValueError(f"{path}: looks like none of the known formats ({', '.join(SIGNS)}); name the reader")


def _nearest(name: str, names: Any) -> str:
    near = get_close_matches(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


__all__ = ["READERS", "MinariReader", "MineRLReader", "NpyReader", "VPTReader", "VideoReader", "guess_reader", "make_reader"]
