"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``: renamed to it once the block is done and the bytes are on the disk, else removed.

    ``is_new``: raises ``FileExistsError``, and changes nothing, if another process has made ``path`` in the meantime.
    """
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other machines may write here too, with the same process ids
    try:
        yield tmp
        fsync_path(tmp)
        if is_new:
            os.link(tmp, path)  # unlike a rename, it replaces nothing
        else:
            tmp.replace(path)
        fsync_path(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
