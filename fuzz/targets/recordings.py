"""The readers of recordings: npy, video, minerl, vpt, minari."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamer.data.readers import make_reader
from fuzz import made
from fuzz.contract import Target, Variant

CODECS = {"mpeg4.mp4": "mpeg4", "h264.mp4": "libx264", "vp9.webm": "libvpx-vp9", "h264.mkv": "libx264", "mjpeg.avi": "mjpeg"}
Files = Callable[[bytes], Mapping[str, bytes]]


def reads(name: str, **options: Any) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        reader = make_reader(name, folder, **options)
        return [reader.read(recording) for recording in reader.find(folder)[:3]]

    return read


def whole(name: str) -> Files:
    return lambda data: {name: data}


def inside(name: str, entry: str, others: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Files:
    """The content of one entry of a zip file, whose checksums fit."""
    return lambda data: {name: made.zipped({**others, entry: data}, compression)}


def sample_clips(suffix: str, limit: int) -> list[bytes]:
    """Real recordings, where there are some that are small."""
    root = os.environ.get("DREAMER_SAMPLE_DATA")
    found = sorted(Path(root).rglob(f"*{suffix}")) if root else []
    return [file.read_bytes() for file in found if file.stat().st_size <= limit][:2]


# ---- npy


def _npy(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "frames.npy").write_bytes(made.npy(np.zeros((3, 4, 4, 3), np.uint8)))
    arrays = {"keyboard.npy": made.npy(np.zeros((3, 8), np.int64)), "camera.npy": made.npy(np.full(3, 60))}
    (folder / "a" / "actions.npz").write_bytes(made.zipped(arrays))
    (folder / "a" / "rewards.npy").write_bytes(made.npy(np.ones(3, np.float32)))
    (folder / "a" / "metadata.json").write_text('{"seed": 0}')


def _npy_variants(folder: Path) -> Sequence[Variant]:
    actions = made.unzipped((folder / "a" / "actions.npz").read_bytes())
    seeds = [(folder / "a" / name).read_bytes() for name in ("frames.npy", "rewards.npy", "metadata.json", "actions.npz")]
    return [
        Variant("frames", whole("a/frames.npy"), [seeds[0]]),
        Variant("rewards", whole("a/rewards.npy"), [seeds[1]]),
        Variant("metadata", whole("a/metadata.json"), [seeds[2]]),
        Variant("actions", whole("a/actions.npz"), [seeds[3], made.zipped(actions, zipfile.ZIP_DEFLATED)]),
        Variant("camera", inside("a/actions.npz", "camera.npy", actions), [actions["camera.npy"]]),
        Variant("keyboard", inside("a/actions.npz", "keyboard.npy", actions, zipfile.ZIP_DEFLATED), [actions["keyboard.npy"]]),
    ]


# ---- video


def _video(folder: Path) -> None:
    made.video(folder / "clip.mp4")


def _video_variants(folder: Path) -> Sequence[Variant]:
    work = folder / "made"
    work.mkdir()
    seeds = [made.video(work / name, 3, codec).read_bytes() for name, codec in CODECS.items()] + sample_clips(".mp4", 100_000)
    for file in work.iterdir():
        file.unlink()
    return [Variant("file", whole("clip.mp4"), seeds)]


# ---- minerl


def _minerl(folder: Path) -> None:
    stream = folder / "MineRLTreechop-v0" / "v3_clip"
    made.video(stream / "recording.mp4", 5)
    keys = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
    arrays: dict[str, Any] = {f"action${key}": np.zeros(3, np.int64) for key in keys}
    arrays |= {"action$camera": np.zeros((3, 2), np.float32), "reward": np.ones(3, np.float32), "observation$dirt": np.zeros(4, np.int64)}
    (stream / "rendered.npz").write_bytes(made.zipped({f"{name}.npy": made.npy(array) for name, array in arrays.items()}))
    (stream / "metadata.json").write_text(json.dumps({"success": True, "duration_steps": 3, "true_video_frame_count": 5}))


def _minerl_variants(folder: Path) -> Sequence[Variant]:
    place = "MineRLTreechop-v0/v3_clip"
    rendered = (folder / place / "rendered.npz").read_bytes()
    entries = made.unzipped(rendered)
    found = [
        Variant("rendered", whole(f"{place}/rendered.npz"), [rendered]),
        Variant("metadata", whole(f"{place}/metadata.json"), [(folder / place / "metadata.json").read_bytes()]),
        Variant("video", whole(f"{place}/recording.mp4"), [(folder / place / "recording.mp4").read_bytes()]),
    ]
    for name in ("reward.npy", "action$camera.npy", "action$jump.npy", "observation$dirt.npy"):
        found.append(Variant(name, inside(f"{place}/rendered.npz", name, entries), [entries[name]]))
    return found


# ---- vpt


def _vpt(folder: Path) -> None:
    made.video(folder / "6.9" / "clip.mp4", 3, size=(36, 64))
    rows = [made.vpt_row(), made.vpt_row(isGuiOpen=True, hotbar=3), made.vpt_row(hotbar=3)]
    (folder / "6.9" / "clip.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _vpt_variants(folder: Path) -> Sequence[Variant]:
    rows = (folder / "6.9" / "clip.jsonl").read_bytes()
    clips = [(folder / "6.9" / "clip.mp4").read_bytes()]
    real = [b"".join(text.splitlines(keepends=True)[:3]) for text in sample_clips(".jsonl", 1 << 30)]
    return [Variant("rows", whole("6.9/clip.jsonl"), [rows, *real]), Variant("video", whole("6.9/clip.mp4"), clips)]


# ---- minari


def _minari(folder: Path) -> None:
    import gymnasium as gym
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    data = folder / "clip-v0" / "data"
    data.mkdir(parents=True)
    image, actions = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Discrete(3)
    storage = MinariStorage.new(data, observation_space=image, action_space=actions, data_format="hdf5")
    frames, ends = list(np.zeros((4, 4, 4, 3), np.uint8)), [False, False, True]
    episode = EpisodeBuffer(
        observations=frames, actions=[0, 1, 2], rewards=[1.0, 1.0, 1.0], terminations=ends, truncations=[False] * 3, infos={}
    )
    storage.update_episodes([episode])


def _minari_variants(folder: Path) -> Sequence[Variant]:
    data = "clip-v0/data"
    metadata = (folder / data / "metadata.json").read_bytes()
    values = json.loads(metadata)

    def space(name: str) -> Files:
        return lambda text: {f"{data}/metadata.json": json.dumps(values | {name: text.decode("latin-1")}).encode()}

    return [
        Variant("data", whole(f"{data}/main_data.hdf5"), [(folder / data / "main_data.hdf5").read_bytes()]),
        Variant("metadata", whole(f"{data}/metadata.json"), [metadata]),
        Variant("observations", space("observation_space"), [values["observation_space"].encode()]),
        Variant("actions", space("action_space"), [values["action_space"].encode()]),
    ]


TARGETS = [
    Target("npy", _npy, _npy_variants, reads("npy")),
    Target("video", _video, _video_variants, reads("video", size=(16, 16), max_frames=500), max_bytes=100_000),
    Target("minerl", _minerl, _minerl_variants, reads("minerl", size=(16, 16), max_frames=500)),
    Target("vpt", _vpt, _vpt_variants, reads("vpt", size=(16, 16), max_frames=500)),
    Target("minari", _minari, _minari_variants, reads("minari")),
]
