"""``dreamer doctor``: what this machine has, and which of dreamer's jobs will run on it. Things are tried, not only looked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
import torch
import torch.distributed
from torch import Tensor

from dreamer.config import DreamerConfig
from dreamer.envs import make_env
from dreamer.envs.minecraft import check_java, load_package
from dreamer.models.cosmos_weights import find_files
from dreamer.pipeline.run import hardware

MIN_TORCH = (2, 11)
MIN_FREE_DISK = 2e9  # bytes: episodes, latents and checkpoints of the demo take 0.5 GB
MIN_MEMORY = 3e9  # bytes: the demo's processes take up to 1.3 GB
PRODUCT_SIZE, PRODUCT_SECONDS = {"cpu": 1024, "cuda": 8192}, 0.3


@dataclass(frozen=True)
class Finding:
    """``name`` runs (``holds``) or not; ``text`` says with what, or what is missing and how to come by it."""

    name: str
    holds: bool
    text: str


@dataclass(frozen=True)
class Diagnosis:
    facts: dict[str, str]
    findings: list[Finding]  # the first is the main job

    @property
    def is_well(self) -> bool:
        """Whether the main job runs here: the demo, from recording to report."""
        return self.findings[0].holds

    def text(self) -> str:
        width = max(map(len, [*self.facts, *(finding.name for finding in self.findings)])) + 2
        lines = [f"     {name:{width}}{text}" for name, text in self.facts.items()]
        found = [f"{'yes' if finding.holds else 'NO':3}  {finding.name:{width}}{finding.text}" for finding in self.findings]
        return "\n".join(["This machine", *lines, "", "What runs here", *found])


def diagnose(config: DreamerConfig) -> Diagnosis:
    """``config``: run_dir, env and cosmos_tokenizer are looked at as they are set. Takes a few seconds; leaves nothing behind."""
    demo = [_torch, lambda: _disk(config.run_dir), _memory, _h264, lambda: _environment(config)]
    findings = [
        _all("the demo: record, train, evaluate", demo),
        _tried("training on a GPU, in bf16", _gpu),
        _tried("recordings as H.264 video (VPT, MineRL)", _h264),
        _tried("recordings as Minari datasets", lambda: _extra("minari", "h5py", "minari")),
        _tried("the Cosmos tokenizer", lambda: _cosmos(config)),
        _tried("dreamer play, in a browser", lambda: _extra("play", "starlette", "uvicorn", "websockets")),
        _tried("MineRL, to play in", lambda: _minecraft("minerl", "minerl")),
        _tried("MineStudio, to play in", lambda: _minecraft("minestudio", "minestudio.simulator")),
        _tried("many processes (torchrun)", _processes),
        _tried("pretokenizing on a Ray cluster", lambda: _extra("ray", "ray", "pyarrow", "pandas")),
    ]
    return Diagnosis(_facts(config), findings)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of square matrices: the fastest that a training can be here, 2 n^3 operations each."""
    size = PRODUCT_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def seconds() -> float:
        began = time.perf_counter()
        product: Tensor = a @ b
        product[0, 0].item()  # waits for a GPU
        return time.perf_counter() - began

    best, ends = seconds(), time.perf_counter() + PRODUCT_SECONDS
    while time.perf_counter() < ends:
        best = min(best, seconds())
    return 2 * size**3 / best


def _facts(config: DreamerConfig) -> dict[str, str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = hardware(device)
    facts["memory"] = f"{_memory_bytes() / 1e9:.1f} GB"
    facts["disk"] = f"{shutil.disk_usage(_nearest(config.run_dir)).free / 1e9:.1f} GB free at {_nearest(config.run_dir).resolve()}"
    rates = [
        f"{matrix_rate(dtype, device) / 1e9:,.0f} GFLOP/s in {name}" for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    facts["matrix products"] = f"{', '.join(rates)}, on {device.type}"
    if device.type == "cuda":
        count, total = torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory
        facts["GPUs"] = f"{count}, the first with {total / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    facts["PyAV"] = f"{av.__version__}, with its own FFmpeg {'.'.join(map(str, av.library_versions['libavcodec']))} (libavcodec)"
    return facts


# ---- jobs; each returns what it runs with, or raises ValueError or OSError that says what is missing ----------------------------


def _tried(name: str, job: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, job())
    except (ValueError, OSError) as error:
        return Finding(name, False, " ".join(str(error).split()))


def _all(name: str, jobs: Iterable[Callable[[], str]]) -> Finding:
    tried = [_tried(name, job) for job in jobs]
    missing = [finding.text for finding in tried if not finding.holds]
    return Finding(name, not missing, "; ".join(missing or [finding.text for finding in tried]))


def _torch() -> str:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise ValueError(f"PyTorch is {torch.__version__}; expected at least {'.'.join(map(str, MIN_TORCH))}: pip install -U torch")
    return f"PyTorch {torch.__version__}"


def _disk(folder: Path) -> str:
    place = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"dreamer")
    except OSError as error:
        raise ValueError(f"{place}: cannot be written to ({error.strerror}); choose another run_dir") from error
    free = shutil.disk_usage(place).free
    if free < MIN_FREE_DISK:
        raise ValueError(f"{place}: {free / 1e9:.1f} GB free; expected at least {MIN_FREE_DISK / 1e9:.0f}; choose another run_dir")
    return "a disk that can be written to"


def _nearest(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _memory() -> str:
    if (total := _memory_bytes()) < MIN_MEMORY:
        raise ValueError(f"{total / 1e9:.1f} GB of memory; expected at least {MIN_MEMORY / 1e9:.0f}")
    return f"{total / 1e9:.0f} GB of memory"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _h264() -> str:
    """A short film there and back."""
    film, frames = io.BytesIO(), [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(4)]
    try:
        with av.open(film, "w", format="mp4") as out:
            stream = out.add_stream("libx264", rate=Fraction(20))
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
            for frame in [*(av.VideoFrame.from_ndarray(f, "rgb24") for f in frames), None]:
                out.mux(stream.encode(frame))  # pyright: ignore[reportAttributeAccessIssue]
        with av.open(io.BytesIO(film.getvalue()), "r") as back:
            count = sum(1 for _ in back.decode(video=0))
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"PyAV {av.__version__} cannot write and read H.264 ({error}); pip install -U av") from error
    if count != len(frames):
        raise ValueError(f"PyAV {av.__version__} read {count} of {len(frames)} frames of H.264; pip install -U av")
    return f"PyAV {av.__version__} writes and reads H.264"


def _environment(config: DreamerConfig) -> str:
    if config.env is None:
        return "no environment is set"
    env = make_env(config.env.name, **config.env.options)
    env.reset(seed=0)
    env.close()
    return f"{config.env.name} starts"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = (
            f"this PyTorch is built for CUDA {torch.version.cuda}, but sees no device"
            if torch.version.cuda
            else "this PyTorch is built for CPUs"
        )
        raise ValueError(f"no CUDA device: {built}")
    if not torch.cuda.is_bf16_supported():
        raise ValueError(f"{torch.cuda.get_device_name()} has no bf16; set precision to fp32")
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _extra(extra: str, *modules: str) -> str:
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ValueError(f"{', '.join(missing)} not installed: pip install 'dreamer4[{extra}]'")
    return ", ".join(f"{module} {importlib.metadata.version(module)}" for module in modules)


def _cosmos(config: DreamerConfig) -> str:
    files = find_files(config.cosmos_tokenizer.checkpoint_path)
    if files.safetensors is None:
        return f"{', '.join(script.name for script in files.scripts)} in {files.folder}; they need trust_torchscript"
    return f"{files.safetensors}; {_extra('cosmos', 'diffusers')}"


def _minecraft(package: str, module: str) -> str:
    load_package(package, package, module)
    check_java(package)
    if platform.system() == "Linux" and not os.environ.get("DISPLAY") and shutil.which("xvfb-run") is None:
        raise ValueError(f"{package}: neither a display nor xvfb-run; on Debian: apt install xvfb")
    return f"{package} {importlib.metadata.version(package)}, Java 8"


def _processes() -> str:
    if not torch.distributed.is_available():
        raise ValueError("this PyTorch is built without torch.distributed")
    backends = [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)]
    if not backends:
        raise ValueError("this PyTorch has neither gloo nor nccl")
    return f"over {' and '.join(backends)}"
