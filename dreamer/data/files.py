"""Files that appear whole or not at all, folders that one process works in at a time, and JSON of a bounded size."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from av.error import FFmpegError

_log = logging.getLogger(__name__)

LOCK = ".lock"
MAX_JSON_BYTES = 16 << 20  # a file, or a line of one

# What a recording itself can cause: a file that is missing, of another kind or badly named, and places beyond its end.
_OWN_FAULTS = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EOVERFLOW}
# FFmpeg gives the same numbers to files that it cannot make sense of. These alone it has from the machine only.
_MACHINE_FAULTS = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET}


def machine_fault(error: BaseException | None) -> OSError | None:
    """The ``OSError`` behind ``error`` that tells of the machine, and may pass; None if the content of a file is at fault."""
    while error is not None:
        if isinstance(error, OSError):
            is_own = error.errno not in _MACHINE_FAULTS if isinstance(error, FFmpegError) else error.errno in _OWN_FAULTS
            if not is_own:
                return error
        error = error.__cause__
    return None


def read_json(path: Path, remedy: str = "use an earlier checkpoint") -> dict[str, Any]:
    """A JSON object from a file; ``ValueError`` naming it if it is missing, and the remedy too if it is damaged or has more
    than ``MAX_JSON_BYTES``."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        data = json.loads(text.decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this the folder of a checkpoint or of a finished run?") from None
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets, without end
        raise ValueError(f"{path}: not readable as JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}; expected a JSON object; {remedy}")
    return data


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where it is
        raise
    finally:
        tmp.unlink(missing_ok=True)


def _open_lock(path: Path) -> int | None:
    """A descriptor; None where nobody could write into the folder, which has no lock either."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's
    except FileNotFoundError:
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work in ``folder``, which is made, alone: ``.lock`` there, an empty file that stays, is held until the block or the process ends.

    Raises ``ValueError`` if another process holds it. Warns where the file system knows no locks. In a folder that cannot be written to
    there is nothing to guard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_lock(folder / LOCK)
    if file is None:
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(
            f"{folder}: another process is at work here (it holds {LOCK}); let it end, stop it, or use another folder"
        ) from None
    except OSError as error:
        _log.warning("%s: no lock here (%s): see to it that no other process works in this folder", folder, error.strerror)
    try:
        yield
    finally:
        os.close(file)


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
