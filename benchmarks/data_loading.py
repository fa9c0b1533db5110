"""Windows of latents a second, from a pretokenized store and by tokenizing frames on the fly. See docs/benchmarks.md.

    python benchmarks/data_loading.py [--device cuda] [--json FILE] [--seconds 2] [--no-cosmos]

All weights are random: they decide what comes out, not how long it takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamer.cli import PRESETS
from dreamer.config import DreamerConfig
from dreamer.data import (
    EpisodeStore,
    EpisodeWriter,
    LatentStore,
    LatentWriter,
    PretokenizedDataset,
    batches,
    episode_from_steps,
    frame_batches,
)
from dreamer.models import CausalTokenizer, CosmosTokenizerConfig, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import build_network
from dreamer.ops.minecraft import MINERL
from dreamer.pipeline.run import hardware, peak_memory_mb, write_json
from dreamer.types import Tokenizer
from dreamer.yaml_config import load_config

ROWS, STEPS = 16, 5  # of a batch: windows, and latent steps of each
ROUNDS = 5  # the middle one counts
TARGET = 20  # times faster than on the fly
FRAME_SIZE = 64
EPISODE_FRAMES, EPISODES, LATENT_EPISODES = 200, 4, 200


@dataclass(frozen=True)
class Rate:
    """What one way of getting windows gives a second."""

    name: str
    windows: float
    latent_steps: float
    tokens: float  # latent ones
    megabytes: float  # of latents and actions, or of frames
    peak_memory_mb: float  # of the process so far
    times_faster: float | None = None  # than tokenizing on the fly


def windows_per_second(make: Callable[[], int], seconds: float) -> float:
    """``make`` returns how many windows it made. It is called for about ``seconds``, in rounds, or once if that takes longer."""
    began = time.perf_counter()
    first = make()  # opens, compiles and fills caches
    if (took := time.perf_counter() - began) > seconds:
        return first / took
    rates = []
    for _ in range(ROUNDS):
        began, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - began < seconds / ROUNDS:
            count += make()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def write_frames(path: Path) -> EpisodeStore:
    """Episodes of a pattern that moves, compressed as recordings are."""
    ramp = np.arange(FRAME_SIZE)
    with EpisodeWriter(path, MINERL, frames_per_second=20.0) as writer:
        for episode in range(EPISODES):
            shift = np.arange(EPISODE_FRAMES)[:, None, None]
            picture = (ramp[:, None] * (1 + episode) + ramp * 2 + shift * 3) % 256
            frames = np.repeat(picture[:, None], 3, 1).astype(np.uint8)
            writer.add(episode_from_steps(frames, np.zeros((EPISODE_FRAMES, MINERL.num_columns)), np.zeros(EPISODE_FRAMES)))
    return EpisodeStore(path)


def write_latents(path: Path, tokenizer: Tokenizer) -> LatentStore:
    """Latents of the shape that the tokenizer gives, without content that matters."""
    steps, stride = 500, tokenizer.temporal_stride
    rng = np.random.default_rng(0)
    with LatentWriter(
        path,
        action_space=MINERL,
        tokenizer_fingerprint="benchmark",
        token_grid=tokenizer.token_grid,
        latent_channels=tokenizer.latent_channels,
        temporal_stride=stride,
        source_fingerprint="",
        dtype="float16",
    ) as writer:
        shape = (steps, tokenizer.token_grid[0] * tokenizer.token_grid[1], tokenizer.latent_channels)
        for _ in range(LATENT_EPISODES):
            actions, known = np.zeros((steps, stride, MINERL.num_columns), np.float32), np.ones((steps, stride), bool)
            rewards, terminals = np.zeros(steps, np.float32), np.zeros(steps, bool)
            writer.add(rng.standard_normal(shape, np.float32), actions, known, rewards, terminals)
    store = LatentStore(path)
    store.verify()  # once, as the first epoch does
    return store


def on_the_fly(name: str, store: EpisodeStore, tokenizer: Tokenizer, rows: int, device: torch.device, seconds: float) -> Rate:
    """Read, unpack and encode the frames of the same windows."""
    num_frames = 1 + (STEPS - 1) * tokenizer.temporal_stride
    with closing(frame_batches(store, batch_size=rows, num_frames=num_frames, seed=0)) as stream:

        def make() -> int:
            with torch.no_grad():
                tokenizer.encode(next(stream).to(device).frames)
            synchronize(device)
            return rows

        rate = windows_per_second(make, seconds)
    tokens = tokenizer.token_grid[0] * tokenizer.token_grid[1]
    return Rate(name, rate, rate * STEPS, rate * STEPS * tokens, rate * num_frames * 3 * FRAME_SIZE**2 / 1e6, peak_memory_mb())


def loaded(store: LatentStore, num_workers: int, device: torch.device, seconds: float, reference: Rate) -> Rate:
    """Windows as training gets them. num_workers: threads; 0 for none."""
    dataset = PretokenizedDataset(store, STEPS)
    with closing(batches(dataset, batch_size=ROWS, seed=0, prefetch=2 * num_workers, num_workers=num_workers)) as stream:

        def make() -> int:
            next(stream).to(device)
            synchronize(device)
            return ROWS

        rate = windows_per_second(make, seconds)
    num_bytes = sum(array.nbytes for array in store.arrays(0, 0, STEPS).values())
    tokens, faster = store.token_grid[0] * store.token_grid[1], rate / reference.windows
    return Rate(
        f"  loaded, {num_workers} threads", rate, rate * STEPS, rate * STEPS * tokens, rate * num_bytes / 1e6, peak_memory_mb(), faster
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    name: str, tokenizer: Tokenizer, frames: EpisodeStore, folder: Path, device: torch.device, seconds: float, rows: int
) -> list[Rate]:
    """Both ways; ``rows`` windows are tokenized at once."""
    rates = [on_the_fly(f"{name}, on the fly", frames, tokenizer, rows, device, seconds)]
    print(told(rates[0]), flush=True)
    latents = write_latents(folder / f"latents of {name}", tokenizer)
    for num_workers in (0, 1, 2, 4):
        rates.append(loaded(latents, num_workers, device, seconds, reference=rates[0]))
        print(told(rates[-1]), flush=True)
    return rates


def told(rate: Rate) -> str:
    faster = "" if rate.times_faster is None else f"{rate.times_faster:>12,.0f} times"
    speed = f"{rate.windows:>14,.2f} windows/s {rate.tokens:>14,.1f} tokens/s {rate.megabytes:>10,.2f} MB/s"
    return f"{rate.name:<32}{speed}{rate.peak_memory_mb:>8,.0f} MB held{faster}"


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pretokenized latents against tokenizing on the fly.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured for each figure")
    parser.add_argument("--no-cosmos", action="store_true", help="leave out Cosmos, which takes minutes on a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    device = torch.device(arguments.device)
    demo = load_config(DreamerConfig, PRESETS / "demo.yaml")
    small: Any = CausalTokenizer(demo.tokenizer, (3, FRAME_SIZE, FRAME_SIZE)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        frames = write_frames(Path(folder) / "frames")
        rates = compare("causal (demo)", small, frames, Path(folder), device, arguments.seconds, rows=16)
        if not arguments.no_cosmos:
            cosmos: Any = CosmosTokenizerWrapper(CosmosTokenizerConfig(enabled=True), build_network({})).to(device)
            rows = 16 if device.type == "cuda" else 1
            rates += compare("Cosmos CV8x8x8", cosmos, frames, Path(folder), device, arguments.seconds, rows)
    slowest = min(rate.times_faster for rate in rates if rate.times_faster is not None)
    print(f"loading is at least {slowest:,.0f} times faster ({'met' if slowest >= TARGET else 'NOT met'}: {TARGET})")
    if arguments.json:
        write_json(arguments.json, {"hardware": hardware(device), "rates": [asdict(rate) for rate in rates]})


if __name__ == "__main__":
    main()
