"""Recording formats, one file each. A new format is a class with ``Reader``'s methods and one line in ``READERS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dreamer.data.readers.npy import NpyReader
from dreamer.data.readers.video import VideoReader
from dreamer.types import Reader

READERS: dict[str, Callable[..., Reader]] = {
    "npy": NpyReader,
    "video": VideoReader,
}


def make_reader(name: str, path: Path | str, /, **options: Any) -> Reader:
    """The reader ``name`` for the recordings at ``path``.

    Raises ``ValueError`` for an unknown name, with the nearest, and for an option that the reader does not have or cannot use.
    """
    if name not in READERS:
        near = get_close_matches(name, READERS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no reader is called {name!r}; expected one of {sorted(READERS)}.{hint}")
    if not Path(path).exists():
        raise ValueError(f"{path}: does not exist")
    accepted = [option for option in inspect.signature(READERS[name]).parameters if option != "path"]
    if unknown := [option for option in options if option not in accepted]:
        raise ValueError(f"reader {name!r} has no option {unknown[0]!r}; expected one of {', '.join(accepted) or 'none'}")
    try:
        return READERS[name](path, **options)
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"reader {name!r}: {where}: {message}; got {first['input']!r}") from error


__all__ = ["READERS", "NpyReader", "VideoReader", "make_reader"]
