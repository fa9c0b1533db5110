"""Files that survive crashes: a folder with ``store.json`` and append-only ``shard-000000.safetensors``, ...

Writing goes tmp -> fsync -> rename, so a file with its final name is complete. The index is rebuilt by listing the shards; each
describes its episodes in its header. Checksums cover headers and data: damage is a ``ValueError`` that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dreamer.data.files import atomic_file

STORE_FILE = "store.json"
STALE_SECONDS = 3600  # a temporary file this old belongs to a writer that died
DISK_MARGIN = 1 << 20
DTYPES = {"BOOL": "bool", "U8": "uint8", "U32": "uint32", "I64": "int64", "F16": "float16", "F32": "float32"}
Rows = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape of a row


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raise ``OSError`` (ENOSPC) before anything is written if ``num_bytes`` and a small margin do not fit."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + DISK_MARGIN:
        need, have = (num_bytes + DISK_MARGIN) / 2**20, free / 2**20
        message = f"too little disk: {need:.1f} MiB needed, {have:.1f} MiB free; nothing was written. Free some space and run again"
        raise OSError(errno.ENOSPC, message, str(folder))


def canonical(value: Any, where: str) -> str:
    """JSON that is equal for equal values. Raises ``ValueError`` naming ``where`` for what JSON cannot hold, and for NaN."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; expected finite JSON values (str, int, float, bool, None, lists, dicts)") from error


def checksum(*buffers: Any) -> int:
    """CRC-32 of the bytes of the buffers, one after the other."""
    value = 0
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return value


def write_shard(path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any], *, is_new: bool = True) -> None:
    """Write arrays and a JSON header as one safetensors file, atomically. ``is_new``: raises ``FileExistsError`` rather than replace a
    shard."""
    text = canonical(header, str(path))
    require_disk(path.parent, sum(a.nbytes for a in arrays.values()) + len(text))
    with atomic_file(path, is_new=is_new) as tmp:
        # one key only: safetensors keeps no order among several, and equal shards must be equal bytes
        tmp.touch()
        mode = tmp.stat().st_mode  # as the umask wants it; safetensors would make the file for its owner alone
        metadata = {"dreamer": f"{checksum(text.encode()):08x}{text}"}
        try:
            save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, tmp, metadata)
        except SafetensorError as error:  # this is how it tells that the disk is full; the number stands in the text
            number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
            raise OSError(number, f"{os.strerror(number)}; the shard was not written. Mend this and run again", str(path)) from error
        tmp.chmod(mode)


class Shard:
    """A finished shard: its header, and its arrays mapped into memory (read-only)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "numpy") as file:  # checks sizes and offsets against the file's length
                text = (file.metadata() or {}).get("dreamer", "")
            data = np.asarray(np.memmap(path, np.uint8, "r"))
            size = 8 + int.from_bytes(data[:8].tobytes(), "little")
            layout = json.loads(data[8:size].tobytes())
            self.arrays = {k: _view(data[size:], v) for k, v in layout.items() if k != "__metadata__"}
            if f"{checksum(text[8:].encode()):08x}" != text[:8]:
                raise ValueError("its header does not match its checksum")
            self.header: dict[str, Any] = json.loads(text[8:])
            if not isinstance(self.header.get("episodes"), list):
                raise ValueError("its header lists no episodes")
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise self.damage(error) from error

    @property
    def number(self) -> int:
        return shard_number(self.path)

    def damage(self, what: object) -> ValueError:
        return ValueError(
            f"{self.path}: damaged or truncated shard ({what}). Restore the file, or move it away to go on without its episodes"
        )


def _view(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    return data[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


def shard_number(path: Path) -> int:
    return int(path.stem.removeprefix("shard-"))


def shard_paths(folder: Path) -> list[Path]:
    """Finished shards in the order in which they were written."""
    return sorted(p for p in folder.glob("shard-*.safetensors") if re.fullmatch(r"shard-\d{6,}", p.stem))


def remove_stale_files(folder: Path) -> None:
    """Remove what killed writers left behind."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # finished or removed by another process in between
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


class ShardedWriter:
    """Appends episodes to a store: collects rows of arrays, writes them as shards.

    A kill loses at most the episodes of the unfinished shard. Several processes may append to one store. ``shard_episodes``: None if
    the caller says where shards end.
    """

    def __init__(self, path: Path | str, meta: dict[str, Any], *, shard_episodes: int | None, shard_bytes: int = 256 << 20) -> None:
        if (shard_episodes is not None and shard_episodes < 1) or shard_bytes < 1:
            raise ValueError(f"shard_episodes {shard_episodes}, shard_bytes {shard_bytes}; expected at least 1")
        self.path = Path(path)
        self.meta: dict[str, Any] = json.loads(canonical(meta, str(self.path)))
        self.shard_episodes, self.shard_bytes = shard_episodes, shard_bytes
        self._entries: list[dict[str, Any]] = []
        self._parts: list[dict[str, np.ndarray]] = []
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file; expected a folder for the store")
        if (self.path / STORE_FILE).exists():
            self._adopt_store_file()
        if self.path.is_dir():
            remove_stale_files(self.path)

    def _adopt_store_file(self) -> None:
        """Go on with the constants of the store that is there, if they agree; None means "whatever the store has"."""
        found = read_store_file(self.path, self.meta["kind"])
        for key, value in self.meta.items():
            if value is not None and found.get(key) != value:
                raise ValueError(f"{self.path / STORE_FILE}: {key} is {found.get(key)!r}; cannot append with {value!r}. Use another folder")
        self.meta = found

    def _write_store_file(self) -> None:
        text = json.dumps(self.meta, indent=1, sort_keys=True, allow_nan=False)
        self.path.mkdir(parents=True, exist_ok=True)
        require_disk(self.path, len(text))
        with atomic_file(self.path / STORE_FILE) as tmp:
            tmp.write_text(text)

    def _append(self, entry: dict[str, Any], parts: dict[str, np.ndarray]) -> None:
        """Queue one episode: ``entry`` goes to the header, ``parts`` are concatenated with those of the other episodes."""
        canonical(entry, f"{self.path}: info of an episode")
        self._entries.append(entry)
        self._parts.append(parts)
        if self.shard_episodes is None:
            return
        if len(self._parts) >= self.shard_episodes or sum(a.nbytes for p in self._parts for a in p.values()) >= self.shard_bytes:
            self.flush()

    def _header(self) -> dict[str, Any]:
        return {"store_checksum": checksum(canonical(self.meta, str(self.path)).encode()), "episodes": self._entries}

    def flush(self) -> None:
        """Write the queued episodes as one shard. If this fails they stay queued."""
        if not self._parts:
            return
        self._open_store()
        arrays = {k: np.concatenate([p[k] for p in self._parts]) for k in self._parts[0]}
        while self._parts:
            paths = shard_paths(self.path)
            number = shard_number(paths[-1]) + 1 if paths else 0
            with suppress(FileExistsError):  # another process was faster: the next number
                write_shard(shard_path(self.path, number), arrays, self._header())
                self._entries, self._parts = [], []

    def _open_store(self) -> None:
        """Shards belong to a store file: the one that is there, if its constants agree, else a new one."""
        if (self.path / STORE_FILE).exists():
            self._adopt_store_file()
        else:
            self._write_store_file()


def read_store_file(path: Path, kind: str) -> dict[str, Any]:
    """The constants of a store. Raises ``ValueError`` naming the file if it is missing, unreadable or of another kind."""
    file = path / STORE_FILE
    if not file.is_file():
        raise ValueError(f"{path}: no {kind} store here ({STORE_FILE} is missing)")
    try:
        meta = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("kind") != kind or meta.get("format") != 1:
        got = f"kind {meta.get('kind')!r}, format {meta.get('format')!r}" if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"{file}: {got}; expected kind {kind!r}, format 1")
    return meta


class ShardedStore:
    """Reads a store: every episode is a run of rows in the arrays of one shard.

    An episode's rows are compared with their checksum when it is first touched.
    """

    kind: str
    entry_types: ClassVar[dict[str, type]] = {"length": int, "task": int, "has_rewards": bool, "checksum": int}

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.meta = read_store_file(self.path, self.kind)
        try:
            self._rows = self._open_meta(self.meta)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = error if type(error) is ValueError else repr(error)
            raise ValueError(f"{self.path / STORE_FILE}: not a valid {self.kind} store ({what})") from error
        store_checksum = checksum(canonical(self.meta, str(self.path)).encode())
        self._entries: list[dict[str, Any]] = []
        self._places: list[tuple[Shard, int]] = []  # shard and first row of each episode
        self.shards = [Shard(p) for p in shard_paths(self.path)]
        for shard in self.shards:
            if shard.header.get("store_checksum") != store_checksum:
                raise ValueError(f"{shard.path}: belongs to another store, or {STORE_FILE} beside it was changed")
            row = 0
            for entry in shard.header["episodes"]:
                if not _is_entry(entry, self.entry_types):
                    raise shard.damage(f"an episode is described by {str(entry)[:200]}")
                self._entries.append(entry)
                self._places.append((shard, row))
                row += entry["length"]
            self._check_arrays(shard, row)
        self.lengths = np.array([e["length"] for e in self._entries], np.int64)
        self._verified = np.zeros(len(self._entries), bool)

    def _open_meta(self, meta: dict[str, Any]) -> Rows:
        """Read the constants; return the arrays with one row per frame or latent step."""
        raise NotImplementedError

    def _check_arrays(self, shard: Shard, num_rows: int) -> None:
        for name, (dtype, shape) in self._rows.items():
            array = shard.arrays.get(name)
            if array is None or array.dtype != dtype or array.shape != (num_rows, *shape):
                got = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise shard.damage(f"{name}: got {got}; expected {dtype} {(num_rows, *shape)}")

    @property
    def num_episodes(self) -> int:
        return len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tasks(self) -> np.ndarray:
        return np.array([e["task"] for e in self._entries], np.int64)

    @property
    def has_rewards(self) -> np.ndarray:
        """Of which episodes rewards and ends are known."""
        return np.array([e["has_rewards"] for e in self._entries], bool)

    def place(self, episode: int, start: int, stop: int | None) -> tuple[Shard, slice]:
        """The shard and the rows of a part of an episode. Raises ``ValueError`` for what does not exist or is damaged."""
        if not 0 <= episode < len(self._entries):
            raise ValueError(f"{self.path}: no episode {episode}; it holds {len(self._entries)}")
        length = int(self.lengths[episode])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"{self.path}: episode {episode} has length {length}; asked for {start}:{stop}")
        shard, row = self._places[episode]
        if not self._verified[episode]:
            rows = [shard.arrays[name][row : row + length] for name in sorted(self._rows)]
            if checksum(*rows) != self._entries[episode]["checksum"]:
                raise shard.damage(f"episode {episode} does not match its checksum")
            self._verified[episode] = True
        return shard, slice(row + start, row + stop)

    def arrays(self, episode: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Read-only views of the rows ``start:stop`` of an episode, by name."""
        shard, rows = self.place(episode, start, stop)
        return {name: shard.arrays[name][rows] for name in self._rows}

    def verify(self) -> None:
        """Compare every episode with its checksum. Raises ``ValueError`` naming the first damaged shard."""
        for episode in range(len(self)):
            self.place(episode, 0, None)

    def fingerprint(self, num_episodes: int | None = None) -> str:
        """Hash of the store's constants and the content of its first ``num_episodes`` episodes (default: all)."""
        return self._fingerprints[len(self) if num_episodes is None else num_episodes]

    @cached_property
    def _fingerprints(self) -> list[str]:
        """The fingerprint of the first n episodes, for each n."""
        digest = hashlib.sha256(canonical(self.meta, str(self.path)).encode())
        prints = [digest.hexdigest()[:32]]
        for entry in self._entries:
            digest.update(canonical([entry["checksum"], entry["length"], entry["task"]], str(self.path)).encode())
            prints.append(digest.hexdigest()[:32])
        return prints


def _is_entry(entry: Any, types: dict[str, type]) -> bool:
    """Whether a header describes an episode with all that is read of it, in numbers that arrays can hold."""
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in types.items()):
        return False
    numbers = [entry[key] for key, kind in types.items() if kind in (int, float)]
    return entry["length"] > 0 and all(math.isfinite(n) and abs(n) < 1 << 63 for n in numbers)


def positive(meta: dict[str, Any], *names: str) -> None:
    """Raise ``ValueError`` unless these constants of a store are whole numbers above 0, or lists of such."""
    for name in names:
        values = meta[name] if isinstance(meta[name], list) else [meta[name]]
        if not values or any(type(value) is not int or not 0 < value < 1 << 31 for value in values):
            raise ValueError(f"{name} is {str(meta[name])[:80]}; expected whole numbers above 0")


def rows_checksum(rows: dict[str, np.ndarray]) -> int:
    """The checksum that ``ShardedStore`` expects of an episode's rows."""
    return checksum(*(np.ascontiguousarray(rows[name]) for name in sorted(rows)))
