"""Episodes and latents on disk. ``dreamer/data/shards.py`` holds the file format; both kinds of store share it."""

from __future__ import annotations

import hashlib
import math
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, UInt8

from dreamer.data.checks import check_episode
from dreamer.data.groups import Source, read_groups
from dreamer.data.shards import Rows, Shard, ShardedStore, ShardedWriter, checksum, positive, rows_checksum, shard_path, write_shard
from dreamer.types import ActionSpace, Episode

Codec = Literal["zlib", "raw"]
MAX_DECODED_BYTES = 8 << 30  # of the frames that are asked for at once


class EpisodeWriter(ShardedWriter):
    """Appends episodes to a folder: ``with EpisodeWriter(path, space, frames_per_second=20) as writer: writer.add(episode)``.

    codec: "zlib" compresses each frame on its own, so that any frame can be read alone; "raw" keeps the bytes.
    extra: JSON values about the whole store (environment, size, ...). An existing store is appended to; ``ValueError`` if it
    was made with other settings. On leaving the block, also by an exception, what was added is written.
    """

    def __init__(
        self,
        path: Path | str,
        action_space: ActionSpace,
        *,
        frames_per_second: float,
        codec: Codec = "zlib",
        shard_episodes: int = 32,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if codec not in ("zlib", "raw") or not frames_per_second > 0:
            raise ValueError(f"codec {codec!r}, frames_per_second {frames_per_second}; expected zlib or raw, and a positive rate")
        self.action_space = action_space
        meta = {
            "kind": "episodes",
            "format": 1,
            "action_space": action_space.to_json(),
            "frames_per_second": float(frames_per_second),
            "codec": codec,
            "frame_shape": None,  # set by the first episode
            "extra": extra,
        }
        super().__init__(path, meta, shard_episodes=shard_episodes)
        self.num_added = 0

    def add(self, episode: Episode) -> None:
        """Queue an episode. Raises ``ValueError`` if it breaks the time contract, ``OSError`` if the disk is full."""
        where = f"{self.path}: episode {self.num_added} of this writer ({episode.info.get('source', 'no source given')})"
        check_episode(episode, self.action_space, where)
        shape = list(episode.frames.shape[1:])
        if self.meta["frame_shape"] not in (None, shape):
            raise ValueError(f"{where}: frames of shape {shape}; this store holds {self.meta['frame_shape']}")
        self.meta["frame_shape"] = shape
        blobs = [np.ascontiguousarray(f).tobytes() for f in episode.frames]
        if self.meta["codec"] == "zlib":
            blobs = [zlib.compress(b, 1) for b in blobs]
        rows = {name: getattr(episode, name) for name in ("actions", "action_mask", "rewards", "terminals")}
        rows["frame_ends"] = np.cumsum([len(b) for b in blobs], dtype=np.int64)
        rows["frame_checksums"] = np.array([checksum(b) for b in blobs], np.uint32)
        entry = {
            "length": len(episode),
            "num_bytes": int(rows["frame_ends"][-1]),
            "task": int(episode.task),
            "has_rewards": episode.has_rewards,
            "return": float(episode.rewards.sum(dtype=np.float64)),
            "info": episode.info,
            "checksum": rows_checksum(rows),
        }
        self._append(entry, {**rows, "frame_bytes": np.frombuffer(b"".join(blobs), np.uint8)})
        self.num_added += 1

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()


class EpisodeStore(ShardedStore):
    """Reads the episodes of a folder. It shows what was finished when it was opened; open it again to see what came since.

    Raises ``ValueError`` naming the file for a missing store and for damage.
    """

    kind = "episodes"
    entry_types: ClassVar[dict[str, type]] = ShardedStore.entry_types | {"num_bytes": int, "return": float, "info": dict}

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.returns = np.array([e["return"] for e in self._entries], np.float64)
        self.infos: list[dict[str, Any]] = [e["info"] for e in self._entries]
        self._first_bytes = self._index_bytes()

    def _open_meta(self, meta: dict[str, Any]) -> Rows:
        positive(meta, "frame_shape")
        self.action_space = ActionSpace.from_json(meta["action_space"])
        self.frame_shape: tuple[int, ...] = tuple(meta["frame_shape"])
        self.fps = float(meta["frames_per_second"])
        self.codec: str = meta["codec"]
        self.extra: dict[str, Any] = _extra(meta)
        if len(self.frame_shape) != 3 or not 0 < self.fps < math.inf or self.codec not in ("zlib", "raw"):
            raise ValueError(f"frame_shape {self.frame_shape}, frames_per_second {self.fps}, codec {str(self.codec)[:80]!r}")
        return {
            "actions": ("float32", (self.action_space.num_columns,)),
            "action_mask": ("bool", ()),
            "rewards": ("float32", ()),
            "terminals": ("bool", ()),
            "frame_ends": ("int64", ()),
            "frame_checksums": ("uint32", ()),
        }

    def _index_bytes(self) -> list[int]:
        """Where each episode's frames begin in its shard's ``frame_bytes``."""
        firsts, current, total = [], None, 0
        for (shard, _), entry in zip(self._places, self._entries, strict=True):
            if shard is not current:
                current, total = shard, 0
            firsts.append(total)
            total += entry["num_bytes"]
            frame_bytes = shard.arrays.get("frame_bytes")
            if frame_bytes is None or frame_bytes.dtype != np.uint8 or total > frame_bytes.size or entry["num_bytes"] < 0:
                raise shard.damage("frame_bytes is shorter than its episodes")
        return firsts

    @property
    def sources(self) -> list[Source]:
        """A name for each episode, by its content, as ``EpisodeSource`` wants it."""
        return [(f"episode {i} of task {e['task']}, checksum {e['checksum']:08x}", "") for i, e in enumerate(self._entries)]

    def episode(self, index: int) -> Episode:
        rows = self.arrays(index)
        return Episode(
            frames=self.frames(index),
            actions=rows["actions"].copy(),
            action_mask=rows["action_mask"].copy(),
            rewards=rows["rewards"].copy(),
            terminals=rows["terminals"].copy(),
            task=self._entries[index]["task"],
            has_rewards=self._entries[index]["has_rewards"],
            info=dict(self.infos[index]),
        )

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "F C H W"]:
        """Frames ``start:stop`` of an episode; only these are decoded."""
        shard, _ = self.place(index, start, stop)
        rows = self.arrays(index, start, stop)
        first = self.arrays(index, start - 1, start)["frame_ends"] if start else [0]
        ends = np.append(first, rows["frame_ends"]) + self._first_bytes[index]
        if (num_bytes := (len(ends) - 1) * math.prod(self.frame_shape)) > MAX_DECODED_BYTES:
            raise ValueError(f"{shard.path}: episode {index}: {num_bytes} bytes unpacked, more than {MAX_DECODED_BYTES}; read a part of it")
        out = np.empty((len(ends) - 1, *self.frame_shape), np.uint8)
        for i, expected in enumerate(rows["frame_checksums"]):
            blob = shard.arrays["frame_bytes"][ends[i] : ends[i + 1]]
            if checksum(blob) != expected:
                raise shard.damage(f"frame {start + i} of episode {index} does not match its checksum")
            out[i] = self._decode(blob, shard)
        return out

    def _decode(self, blob: np.ndarray, shard: Shard) -> np.ndarray:
        size = int(np.prod(self.frame_shape))
        data: Any = blob
        if self.codec == "zlib":
            try:
                data = zlib.decompressobj().decompress(blob.tobytes(), size + 1)  # a frame can never unpack to more than its size
            except zlib.error as error:
                raise shard.damage(error) from error
        if len(data) != size:
            raise shard.damage(f"a frame of {len(data)} bytes; expected {size}")
        return np.frombuffer(data, np.uint8).reshape(self.frame_shape)


def split_episodes(num_episodes: int, val_fraction: float, seed: int = 0) -> tuple[Integer[np.ndarray, " K"], Integer[np.ndarray, " V"]]:
    """Which episodes train and which validate, as sorted indices: ``(train_ids, val_ids)``.

    A pure function of (index, seed): an episode keeps its side when others are appended. Neither side is empty: the first episode
    trains, the second validates, the others are hashed. Raises ``ValueError`` for fewer than 2 episodes.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected a number between 0 and 1")
    if num_episodes < 2:
        raise ValueError(f"{num_episodes} episode(s) cannot be split into training and validation; record at least 2")
    digests = [hashlib.blake2b(f"{seed}:{i}".encode(), digest_size=8).digest() for i in range(num_episodes)]
    is_val = np.array([int.from_bytes(d, "big") / 2**64 < val_fraction for d in digests])
    is_val[:2] = False, True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


class LatentWriter(ShardedWriter):
    """Appends the latents of episodes to a folder, by a tokenizer that ``tokenizer_fingerprint`` names.

    ``source_fingerprint`` says which episodes the shards come from. actions_per_step: the P of ``add`` (default: ``temporal_stride``).
    shard_episodes: None if ``write_group`` ends each shard. Leaving the block writes what was added; leaving it by an exception does
    not, so that shards always end where they should.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        action_space: ActionSpace,
        tokenizer_fingerprint: str,
        token_grid: tuple[int, int],
        latent_channels: int,
        temporal_stride: int,
        source_fingerprint: str,
        actions_per_step: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        shard_episodes: int | None = 32,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {dtype!r}; expected float32 or float16")
        meta = {
            "kind": "latents",
            "format": 1,
            "action_space": action_space.to_json(),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "token_grid": list(token_grid),
            "latent_channels": latent_channels,
            "temporal_stride": temporal_stride,
            "actions_per_step": temporal_stride if actions_per_step is None else actions_per_step,
            "dtype": dtype,
            "extra": extra,
        }
        super().__init__(path, meta, shard_episodes=shard_episodes)
        self.source_fingerprint = source_fingerprint
        self.num_added = 0

    def add(
        self,
        latents: Float32[np.ndarray, "T N Z"],
        actions: Float32[np.ndarray, "T P A"],
        action_mask: Bool[np.ndarray, "T P"],
        rewards: Float32[np.ndarray, " T"],
        terminals: Bool[np.ndarray, " T"],
        task: int = 0,
        has_rewards: bool = True,
        name: str | None = None,
    ) -> None:
        """Queue one episode, called ``name`` in errors. Raises ``ValueError`` for other shapes than the store's, and for values that are
        not finite."""
        where = f"{self.path}: {name or f'episode {self.num_added}'}"
        with np.errstate(over="ignore"):  # found below, with a message
            stored = latents.astype(self.meta["dtype"])
        rows: dict[str, np.ndarray] = {
            "latents": stored,
            "actions": actions,
            "action_mask": action_mask,
            "rewards": rewards,
            "terminals": terminals,
        }
        for row, (dtype, shape) in _latent_rows(self.meta).items():
            array = rows[row]
            if array.dtype != dtype or array.shape != (len(latents), *shape):
                got = f"{array.dtype} {array.shape}"
                raise ValueError(f"{where}: {row} is {got}; expected {dtype} {(len(latents), *shape)}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{where}: {row} holds NaN, infinity or more than {self.meta['dtype']} can")
        entry = {"length": len(latents), "task": int(task), "has_rewards": bool(has_rewards), "checksum": rows_checksum(rows)}
        self._append(entry, rows)
        self.num_added += 1

    def write_group(self, number: int, fingerprint: str, quarantine: list[dict[str, str]]) -> None:
        """Write the queued episodes, none if nothing could be read, as the shard of group ``number``, also in the place of an older one.

        ``quarantine``: name and reason of each of the group's sources that was left out.
        """
        self._open_store()
        empty = {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in _latent_rows(self.meta).items()}
        arrays = {name: np.concatenate([array, *(part[name] for part in self._parts)]) for name, array in empty.items()}
        header = self._header() | {"source_fingerprint": fingerprint, "quarantine": quarantine}
        write_shard(shard_path(self.path, number), arrays, header, is_new=False)
        self._entries, self._parts = [], []

    def _header(self) -> dict[str, Any]:
        return super()._header() | {"source_fingerprint": self.source_fingerprint, "quarantine": []}

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.flush()


class LatentStore(ShardedStore):
    """Reads pretokenized episodes. ``arrays(i, start, stop)`` gives latents, actions, action_mask, rewards and terminals.

    Raises ``ValueError`` while groups of episodes are missing, unless ``allow_partial``: it holds then what is there.
    """

    kind = "latents"

    def __init__(self, path: Path | str, *, allow_partial: bool = False) -> None:
        super().__init__(path)
        groups = read_groups(self.path)  # None: the store was not pretokenized but written by hand, shard after shard
        self.num_groups = len(self.shards) if groups is None else len(groups)
        for shard in self.shards:
            _check_group(shard)
        prints = {shard.number: shard.header["source_fingerprint"] for shard in self.shards}
        self.finished = set(prints) if groups is None else {n for n in range(len(groups)) if prints.get(n) == groups.fingerprint(n)}
        if not allow_partial and not self.is_complete:
            raise ValueError(
                f"{self.path}: incomplete: {len(self.finished)} of {self.num_groups} groups of episodes are there; run pretokenize again"
            )
        self.source_fingerprint = hashlib.sha256(" ".join(prints.values()).encode()).hexdigest()[:32]

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.num_groups

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """Name and reason of each recording that could not be read and was left out."""
        return [left_out for shard in self.shards for left_out in shard.header["quarantine"]]

    def _open_meta(self, meta: dict[str, Any]) -> Rows:
        positive(meta, "token_grid", "latent_channels", "temporal_stride", "actions_per_step")
        self.action_space = ActionSpace.from_json(meta["action_space"])
        self.token_grid: tuple[int, int] = (meta["token_grid"][0], meta["token_grid"][1])
        self.latent_channels: int = meta["latent_channels"]
        self.temporal_stride: int = meta["temporal_stride"]  # frames of a latent step
        self.actions_per_step: int = meta["actions_per_step"]  # as many, or 1 where the others were dropped
        self.tokenizer_fingerprint: str = meta["tokenizer_fingerprint"]
        self.extra: dict[str, Any] = _extra(meta)
        if meta["dtype"] not in ("float32", "float16") or not isinstance(self.tokenizer_fingerprint, str):
            raise ValueError(f"dtype {str(meta['dtype'])[:80]}, tokenizer_fingerprint {str(self.tokenizer_fingerprint)[:80]}")
        return _latent_rows(meta)

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "T N Z"]:
        """Latent steps ``start:stop`` of an episode, a read-only view in the stored dtype."""
        return self.arrays(index, start, stop)["latents"]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ``ValueError`` unless the latents were made by this tokenizer."""
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{self.path}: latents were made by tokenizer {self.tokenizer_fingerprint}, not by {fingerprint}; pretokenize again"
            )

    def check_actions(self, actions: str) -> None:
        """Raise ``ValueError`` if the actions here are known to have been chosen in another way (all, linspace)."""
        made = self.extra.get("pretokenize", {}).get("actions", actions)
        if made != actions:
            raise ValueError(
                f"{self.path}: was made with the actions {made!r}, not {actions!r}; set data.actions={made} (or --actions {made}), or "
                "pretokenize into another folder"
            )


def _check_group(shard: Shard) -> None:
    """Raise ``ValueError`` unless the shard's header says what it was made from."""
    quarantine = shard.header.get("quarantine")
    is_list = isinstance(quarantine, list) and all(isinstance(q, dict) and {"name", "reason"} <= q.keys() for q in quarantine)
    if not is_list or not isinstance(shard.header.get("source_fingerprint"), str):
        raise shard.damage("its header does not say what it was made from")


def _extra(meta: dict[str, Any]) -> dict[str, Any]:
    """What the writer kept beside the constants. Its sections are read by name."""
    extra = meta["extra"] or {}
    if not isinstance(extra, dict) or any(not isinstance(extra.get(name, {}), dict) for name in ("pretokenize", "tokenizer", "source")):
        raise ValueError(f"extra is {str(extra)[:80]}")
    return extra


def _latent_rows(meta: dict[str, Any]) -> Rows:
    columns = ActionSpace.from_json(meta["action_space"]).num_columns
    num_actions = meta["actions_per_step"]
    return {
        "latents": (meta["dtype"], (meta["token_grid"][0] * meta["token_grid"][1], meta["latent_channels"])),
        "actions": ("float32", (num_actions, columns)),
        "action_mask": ("bool", (num_actions,)),
        "rewards": ("float32", ()),
        "terminals": ("bool", ()),
    }
