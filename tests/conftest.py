"""Set-up that every test shares: run-time shape checks, threads, seeds, markers."""

from __future__ import annotations

import json
import os
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports them: pictures and games must not look for a screen.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")

import jaxtyping

# Shapes and types of every annotated function and dataclass of the package are checked in tests, and only there.
jaxtyping.install_import_hook("dreamer", "beartype.beartype")

import av  # noqa: E402
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from dreamer import types  # noqa: E402

# beartype checks a value against a protocol with isinstance, which a protocol must allow.
for _noun in vars(types).values():
    if getattr(_noun, "_is_protocol", False) and _noun is not typing.Protocol:
        typing.runtime_checkable(_noun)

# OMP_NUM_THREADS counts: two threads that wait for each other on a busy machine make a test a hundred times slower.
torch.set_num_threads(int(os.environ.get("DREAMER_TEST_THREADS") or os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))

# No deadline: a slow machine is not a failure. In CI the same examples every time.
hypothesis.settings.register_profile("dreamer", deadline=None, derandomize=bool(os.environ.get("CI")), database=None)
hypothesis.settings.load_profile("dreamer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


def _write_video(path: Path, num_frames: int, size: tuple[int, int] = (32, 48), rate: int = 20, step: int = 8) -> Path:
    """An mp4 whose frame t is grey of brightness ``step * t``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for t in range(num_frames):
            picture = np.full((*size, 3), step * t % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _vpt_row(**changes: Any) -> dict[str, Any]:
    """A row as VPT's recorder writes it; ``changes`` go to where they belong: dx=4, keys=["w"], buttons=[0], hotbar=3, isGuiOpen=True."""
    mouse = {"x": 640.0, "y": 360.0, "dx": 0.0, "dy": 0.0, "scaledX": 0.0, "scaledY": 0.0, "dwheel": 0.0, "buttons": [], "newButtons": []}
    keys = [f"key.keyboard.{key}" for key in changes.pop("keys", [])]
    mouse |= {name: changes.pop(name) for name in list(changes) if name in mouse}
    keyboard = {"keys": keys, "newKeys": [], "chars": ""}
    row = {"mouse": mouse, "keyboard": keyboard, "isGuiOpen": False, "isGuiInventory": False, "hotbar": 0, "yaw": 0.0, "pitch": 0.0}
    return row | {"inventory": [], "tick": 0, "stats": {"minecraft.custom:minecraft.jump": 2}} | changes


def _write_vpt(path: Path, rows: list[Any], num_frames: int | None = None, **video: Any) -> Path:
    """A recording in VPT's layout: ``path`` (mp4) and the .jsonl beside it. A row is a dict of changes to ``_vpt_row``."""
    _write_video(path, len(rows) if num_frames is None else num_frames, **video)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(_vpt_row(**row)) + "\n" for row in rows))
    return path


def _write_minerl(
    folder: Path, length: int = 6, leading: int = 3, metadata: dict[str, Any] | None = None, size: tuple[int, int] = (32, 48), **arrays: Any
) -> Path:
    """A stream in MineRL's layout: ``length`` transitions, ``leading`` frames before the first state. ``arrays`` replace those of
    rendered.npz by their names, with _ for $; None leaves one out."""
    _write_video(folder / "recording.mp4", leading + length + 1, size)
    rng = np.random.default_rng(length)
    keys = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
    rendered: dict[str, Any] = {f"action${key}": rng.integers(0, 2, length) for key in keys}
    rendered["action$camera"] = rng.uniform(-12, 12, (length, 2)).astype(np.float32)
    rendered["reward"] = np.arange(1, length + 1, dtype=np.float32)
    rendered["observation$inventory$dirt"] = np.zeros(length + 1, np.int64)
    rendered |= {name.replace("_", "$"): array for name, array in arrays.items()}
    np.savez(folder / "rendered.npz", **{name: array for name, array in rendered.items() if array is not None})
    known = {"success": True, "duration_ms": 50 * length, "duration_steps": length, "total_reward": 1.0, "stream_name": folder.name}
    known |= {"true_video_frame_count": leading + length + 1} | (metadata or {})
    (folder / "metadata.json").write_text(json.dumps({name: value for name, value in known.items() if value is not None}))
    return folder


def _write_extracted(folder: Path, length: int, size: int = 64, seed: int = 0) -> Path:
    """An episode as MineRL recordings look once extracted: a square that drifts over noise, a reward every fifth frame but one."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (length, size, size, 3), dtype=np.uint8)
    for t in range(length):
        left = (t + 3 * seed) % (size // 2)
        frames[t, size // 4 : size // 2, left : left + size // 4] = rng.integers(150, 255, 3)
    np.save(folder / "frames.npy", frames)
    np.savez(folder / "actions.npz", keyboard=rng.integers(0, 2, (length, 8)), camera=rng.integers(0, 121, length))
    np.save(folder / "rewards.npy", (np.arange(length) % 5 == seed % 5).astype(np.float32))
    (folder / "metadata.json").write_text(json.dumps({"seed": seed}))
    return folder


COSMOS_WIDTHS = {"encoder_block_out_channels": (8, 12, 16, 20), "decode_block_out_channels": (8, 12, 16, 20), "num_layers": 1}


def _small_cosmos(**changes: Any) -> Any:
    """The Cosmos network, narrow; its random weights are scaled up so that what is far in space and time still shows in the output."""
    from dreamer.models.cosmos_weights import build_network

    torch.manual_seed(0)
    network: Any = build_network(COSMOS_WIDTHS | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        network.decoder.conv_out.conv_t.weight.mul_(0.1)  # pixels of about [-1, 1]
    return network


@pytest.fixture(scope="session")
def small_cosmos() -> Callable[..., Any]:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'dreamer4[cosmos]'")
    return _small_cosmos


@pytest.fixture(scope="session")
def cosmos_weights(small_cosmos: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of the narrow network, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("cosmos")
    small_cosmos().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def write_extracted() -> Callable[..., Path]:
    return _write_extracted


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture(scope="session")
def write_vpt() -> Callable[..., Path]:
    return _write_vpt


@pytest.fixture(scope="session")
def write_minerl() -> Callable[..., Path]:
    return _write_minerl


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dreamer demo --preset smoke``, once. Who changes anything in it puts it right again."""
    from dreamer.cli import main

    path = tmp_path_factory.mktemp("demo") / "smoke"
    assert main(["demo", "--preset", "smoke", f"run_dir={path}"]) == 0
    return path


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Real recordings, where there are some."""
    folder = os.environ.get("DREAMER_SAMPLE_DATA")
    if not folder:
        pytest.skip("DREAMER_SAMPLE_DATA names no folder of sample recordings")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
