"""Stores of episodes and of latents, and the predecessor's folders. Checksums are made to fit where only that lets an input in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamer.data import EpisodeStore, LatentStore, LatentWriter, convert_predecessor
from dreamer.data.groups import SOURCES_FILE, Groups
from dreamer.data.shards import STORE_FILE, canonical, checksum, rows_checksum, write_shard
from fuzz import made
from fuzz.contract import Target, Variant

SHARD = "shard-000000.safetensors"


def _description(shard: bytes) -> dict[str, Any]:
    header, _ = made.safetensors_parts(shard)
    return json.loads(json.loads(header)["__metadata__"]["dreamer"][8:])


def _variants(folder: Path) -> list[Variant]:
    shard, constants = (folder / SHARD).read_bytes(), (folder / STORE_FILE).read_bytes()
    description = _description(shard)
    layout, payload = made.safetensors_parts(shard)
    arrays = {key: value for key, value in json.loads(layout).items() if key != "__metadata__"}
    metadata = {"__metadata__": json.loads(layout)["__metadata__"]}
    change_header, change_constants = made.changed_json(description), made.changed_json(json.loads(constants))
    change_layout = made.changed_json(arrays)

    def with_constants(text: bytes) -> Mapping[str, bytes]:
        """Another store.json, and a shard that says that it belongs to it."""
        try:
            found = checksum(canonical(json.loads(text), "").encode())
        except ValueError:
            found = 0
        return {STORE_FILE: text, SHARD: made.resealed(shard, canonical(description | {"store_checksum": found}, "").encode())}

    def with_layout(data: bytes) -> Mapping[str, bytes]:
        changed = json.loads(change_layout(data))
        header = changed | metadata if isinstance(changed, dict) else changed
        return {SHARD: made.safetensors_of(json.dumps(header).encode(), payload)}

    def layout_of(text: bytes) -> Mapping[str, bytes]:
        return {SHARD: made.safetensors_of(text, payload)}

    return [
        Variant("shard", lambda data: {SHARD: data}, [shard]),
        Variant("store.json", lambda data: {STORE_FILE: data}, [constants]),
        Variant("header", lambda data: {SHARD: made.resealed(shard, data)}, [canonical(description, "").encode()]),
        Variant("header values", lambda data: {SHARD: made.resealed(shard, change_header(data))}, []),
        Variant("constants", with_constants, [constants]),
        Variant("constant values", lambda data: with_constants(change_constants(data)), []),
        Variant("layout", layout_of, [layout]),
        Variant("layout values", with_layout, []),
    ]


# ---- episodes


def _episode_variants(folder: Path) -> Sequence[Variant]:
    store = EpisodeStore(folder)
    rows = {name: array[:1].copy() for name, array in store.arrays(0).items()}
    entry = _description((folder / SHARD).read_bytes())
    frame = store.shards[0].arrays["frame_bytes"][: int(rows["frame_ends"][0])].tobytes()

    def one_frame(data: bytes) -> Mapping[str, bytes]:
        """A store of one frame, whose compressed bytes are the input."""
        own = rows | {"frame_ends": np.array([len(data)]), "frame_checksums": np.array([checksum(data)], np.uint32)}
        found = entry["episodes"][0] | {"length": 1, "num_bytes": len(data), "checksum": rows_checksum(own)}
        path = folder / "made.safetensors"
        write_shard(path, own | {"frame_bytes": np.frombuffer(data, np.uint8)}, entry | {"episodes": [found]}, is_new=False)
        shard = path.read_bytes()
        path.unlink()
        return {SHARD: shard}

    return [*_variants(folder), Variant("frame", one_frame, [frame])]


def _read_episodes(folder: Path) -> Any:
    store = EpisodeStore(folder)
    store.verify()
    return [store.episode(i) for i in range(min(3, len(store)))], store.fingerprint(), store.returns, store.tasks, store.sources


# ---- latents


def _latents(folder: Path) -> None:
    writer = LatentWriter(
        folder,
        action_space=made.SPACE,
        tokenizer_fingerprint="abc",
        token_grid=(2, 1),
        latent_channels=3,
        temporal_stride=2,
        source_fingerprint="",
        shard_episodes=None,
        extra={"frames_per_second": 20.0, "pretokenize": {"actions": "all"}},
    )
    groups = Groups(2, (("a", "1"), ("b", "2")))
    with writer:
        for steps in (2, 3):
            latents = np.zeros((steps, 2, 3), np.float32)
            actions, mask = np.zeros((steps, 2, made.SPACE.num_columns), np.float32), np.ones((steps, 2), bool)
            writer.add(latents, actions, mask, np.zeros(steps, np.float32), np.zeros(steps, bool))
        writer.write_group(0, groups.fingerprint(0), [])
    (folder / SOURCES_FILE).write_text(groups.text())


def _latent_variants(folder: Path) -> Sequence[Variant]:
    sources = (folder / SOURCES_FILE).read_bytes()
    change = made.changed_json(json.loads(sources))
    return [
        *_variants(folder),
        Variant("sources", lambda data: {SOURCES_FILE: data}, [sources]),
        Variant("source values", lambda data: {SOURCES_FILE: change(data)}, []),
    ]


def _read_latents(folder: Path) -> Any:
    store = LatentStore(folder)
    store.verify()
    store.check_actions("all")
    return [store.arrays(i) for i in range(min(3, len(store)))], store.fingerprint(), store.quarantine, store.tasks


# ---- the predecessor's folders


def _predecessor(folder: Path) -> None:
    values = {
        "latents": torch.arange(3).half()[:, None, None].expand(-1, 4, 2).contiguous(),
        "actions": {"keyboard": torch.zeros(17, 8), "camera": torch.full((17,), 60)},
        "rewards": torch.zeros(17),
        "info": {"num_frames": 17},
    }
    (folder / "episode_00000").mkdir()
    for name, value in values.items():
        torch.save(value, folder / "episode_00000" / f"{name}.pt")


def _predecessor_variants(folder: Path) -> Sequence[Variant]:
    found = []
    for name in ("latents", "actions", "rewards", "info"):
        place = f"episode_00000/{name}.pt"
        whole = (folder / place).read_bytes()
        entries = made.unzipped(whole)
        found += [
            Variant(name, _whole(place), [whole]),
            Variant(f"{name} pickle", _pickle(place, name, entries), [entries[f"{name}/data.pkl"]]),
        ]
    return found


def _whole(place: str) -> Callable[[bytes], Mapping[str, bytes]]:
    return lambda data: {place: data}


def _pickle(place: str, name: str, entries: Mapping[str, bytes]) -> Callable[[bytes], Mapping[str, bytes]]:
    return lambda data: {place: made.zipped({**entries, f"{name}/data.pkl": data})}


def _read_predecessor(folder: Path) -> Any:
    out = folder / "out"
    try:
        store = convert_predecessor(folder, out)
        return [store.arrays(i) for i in range(len(store))]
    finally:
        shutil.rmtree(out, ignore_errors=True)


TARGETS = [
    Target("episodes", made.episode_store, _episode_variants, _read_episodes),
    Target("latents", _latents, _latent_variants, _read_latents),
    Target("predecessor", _predecessor, _predecessor_variants, _read_predecessor),
]
