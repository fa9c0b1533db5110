"""Small valid files of every kind, and ways to put changed content back into shape (checksums, containers)."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer.data import EpisodeWriter, episode_from_transitions
from dreamer.types import ActionComponent, ActionSpace, Episode

SPACE = ActionSpace((ActionComponent("move", "categorical", 5), ActionComponent("keys", "binary", 2)))


def video(path: Path, num_frames: int = 4, codec: str = "mpeg4", size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=20)
        stream.height, stream.width, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for t in range(num_frames):
            picture = np.full((*size, 3), 40 * t % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def episode(length: int = 4, number: int = 0) -> Episode:
    rng = np.random.default_rng(number)
    actions = np.stack([np.arange(length - 1) % 5, np.arange(length - 1) % 2, np.ones(length - 1)], 1).astype(np.float32)
    frames = rng.integers(0, 256, (length, 3, 4, 4), dtype=np.uint8)
    return episode_from_transitions(frames, actions, np.ones(length - 1, np.float32), True, info={"number": number})


def episode_store(path: Path) -> Path:
    with EpisodeWriter(path, SPACE, frames_per_second=20.0, shard_episodes=2) as writer:
        writer.add(episode(3))
        writer.add(episode(4, 1))
    return path


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def vpt_row(**changes: Any) -> dict[str, Any]:
    mouse = {"x": 640.0, "y": 360.0, "dx": 4.0, "dy": 0.0, "buttons": [0], "newButtons": [0]}
    return {"mouse": mouse, "keyboard": {"keys": ["key.keyboard.w"]}, "isGuiOpen": False, "hotbar": 0} | changes


def safetensors_parts(data: bytes) -> tuple[bytes, bytes]:
    """Header (JSON) and payload."""
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def safetensors_of(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def resealed(shard: bytes, description: bytes) -> bytes:
    """A shard whose own header is ``description``, with the checksum that it needs."""
    header, payload = safetensors_parts(shard)
    layout = json.loads(header)
    text = description.decode("utf-8", "replace")
    layout["__metadata__"] = {"dreamer": f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}{text}"}
    return safetensors_of(json.dumps(layout).encode(), payload)


def png_resealed(data: bytes) -> bytes:
    """The same chunks with checksums that fit, as far as they can be followed."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return bytes(out)


def changed_json(valid: Any) -> Callable[[bytes], bytes]:
    """Bytes to the JSON text of ``valid`` with up to three values replaced: Hypothesis draws from the bytes what and by what."""
    numbers = st.integers() | st.sampled_from([0, -1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 10**30]) | st.floats()
    leaves = st.none() | st.booleans() | numbers | st.text(max_size=8)
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2))
    drawn: list[Any] = []

    @settings(database=None, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(list(_places(valid))), values | st.just(_GONE)), min_size=1, max_size=3))
    def draw(changes: Any) -> None:
        drawn[:] = changes

    def change(data: bytes) -> bytes:
        drawn.clear()
        draw.hypothesis.fuzz_one_input(data)  # pyright: ignore
        whole = [copy.deepcopy(valid)]
        for place, value in drawn:
            _replace(whole, (0, *place), value)
        return json.dumps(whole[0] if whole else None).encode()

    return change


_GONE = object()


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))


def _replace(node: Any, place: tuple[Any, ...], value: Any) -> None:
    """Put ``value`` at the place, unless an earlier change has removed it."""
    *above, last = place
    try:
        for key in above:
            node = node[key]
        if value is _GONE:
            del node[last]
        else:
            node[last] = value
    except (KeyError, IndexError, TypeError):
        return
