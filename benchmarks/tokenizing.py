"""How fast recordings become latents: decoding, encoding and loading, each beside this machine's limit. See docs/benchmarks.md.

    python benchmarks/tokenizing.py [--video FILE.mp4] [--threads 1 2] [--rounds 3] [--json FILE] [--no-cosmos]

The limits are measured in the same rounds: matrix products for encoding, decoding without any conversion, and copies out of a memory-mapped
array for loading. All weights are random: they decide what comes out, not how long it takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from data_loading import ROWS, STEPS, write_latents  # beside this file

from dreamer.config import DreamerConfig
from dreamer.data import PretokenizedDataset, batches
from dreamer.data.readers.frames import decode_frames
from dreamer.evaluation.media import write_video
from dreamer.models import CausalTokenizer, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import build_network
from dreamer.pipeline.run import hardware, write_json
from dreamer.pipeline.step_cost import StepMeter
from dreamer.yaml_config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
SIDE = 1024  # of the matrices that are multiplied
DECODING_THREADS = 2  # as the readers decode
PRODUCTS, DECODE, MAPPED = "matrix products", "bare decode", "memory-mapped reads"


@dataclass(frozen=True)
class Task:
    """Something to repeat; ``run`` returns how many ``unit`` it did."""

    name: str
    unit: str
    run: Callable[[], int]
    limit: str | None = None  # the task that shows what the machine can do; None: this is one
    gflop: float = 0.0  # of one unit


@dataclass(frozen=True)
class Rate:
    """The best of several rounds."""

    name: str
    threads: int
    unit: str
    per_second: float
    gflop_per_second: float | None
    limit: str | None
    share_of_limit: float | None


def measure(task: Task, seconds: float) -> float:
    """Units a second, over about ``seconds`` or one run if that takes longer."""
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        count += task.run()
    return count / (time.perf_counter() - began)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """This thread, and those that it starts, on ``count`` cores; PyTorch with as many threads. What cannot be bound runs on all."""
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(count)
    if bound:
        os.sched_setaffinity(0, sorted(bound)[:count])
    try:
        yield
    finally:
        if bound:
            os.sched_setaffinity(0, bound)


def products() -> Task:
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)

    def run() -> int:
        torch.mm(a, b, out=out)
        return 1

    return Task(PRODUCTS, "products", run, gflop=2 * SIDE**3 / 1e9)


def decoding(video: Path) -> list[Task]:
    """A video's frames as they are, and as the readers give them: in RGB, scaled down."""

    def bare() -> int:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = DECODING_THREADS
            return sum(1 for _ in container.decode(stream))

    def read(side: int) -> Task:
        return Task(f"read at {side}x{side}", "frames", lambda: len(decode_frames(video, (side, side), 10**6)), DECODE)

    return [Task(DECODE, "frames", bare), read(64), read(128)]


def encoding(name: str, tokenizer: Any, num_frames: int) -> Task:
    frames = torch.randint(0, 256, (1, num_frames, *tokenizer.frame_shape), dtype=torch.uint8)

    @torch.no_grad()
    def run() -> int:
        tokenizer.encode(frames)
        return num_frames

    with StepMeter() as meter:
        run()
    return Task(f"encode, {name}", "frames", run, PRODUCTS, meter.flops / num_frames / 1e9)


def tokenizers(with_cosmos: bool) -> list[Task]:
    """Each as its config sets it, with as many frames at once as fill a core."""
    found = []
    for name, side, num_frames in (("vpt_causal_small", 64, 64), ("vpt_causal", 128, 16)):
        config = load_config(DreamerConfig, CONFIGS / f"{name}.yaml")
        found.append(encoding(name, CausalTokenizer(config.tokenizer, (3, side, side)).eval(), num_frames))
    if with_cosmos:
        network = build_network({})
        for name, num_frames in (("minerl_cosmos", 17), ("minerl_cosmos_native", 16)):
            config = load_config(DreamerConfig, CONFIGS / f"{name}.yaml").cosmos_tokenizer
            found.append(encoding(name, CosmosTokenizerWrapper(config, network), num_frames))
    return found


@contextmanager
def loading(folder: Path) -> Iterator[list[Task]]:
    """Windows of latents as training gets them, and the same bytes copied out of one large array."""
    config = load_config(DreamerConfig, CONFIGS / "vpt_causal_small.yaml")
    store = write_latents(folder / "latents", CausalTokenizer(config.tokenizer, (3, 64, 64)))
    np.save(folder / "latents.npy", np.concatenate([store.latents(i).astype(np.float16) for i in range(len(store))]))
    array, rng = np.load(folder / "latents.npy", mmap_mode="r"), np.random.default_rng(0)

    def mapped() -> int:
        return len(np.stack([array[start : start + STEPS] for start in rng.integers(len(array) - STEPS, size=ROWS)]))

    with closing(batches(PretokenizedDataset(store, STEPS), batch_size=ROWS, seed=0, prefetch=0)) as stream:
        load = Task("load latents", "windows", lambda: len(next(stream).latents), MAPPED)
        yield [Task(MAPPED, "windows", mapped), load]


def make_video(path: Path, num_frames: int = 200) -> Path:
    """A moving pattern with noise, 640x360 as contractors' recordings are."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:360, :640]
    times = np.arange(num_frames)[:, None, None]
    pictures = 100 + 60 * np.sin((columns + 5 * times) / 30) + 40 * np.cos((rows - 3 * times) / 20) + rng.normal(0, 4, (360, 640))
    write_video(path, np.repeat(pictures.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3), fps=20)
    return path


def best_rates(tasks: list[Task], threads: int, rounds: int, seconds: float) -> list[Rate]:
    """The rounds go through all tasks one after the other, so that other work on the machine slows limits and tasks alike."""
    rates = dict.fromkeys((task.name for task in tasks), 0.0)
    with cores(threads):
        for _ in range(rounds):
            for task in tasks:
                rates[task.name] = max(rates[task.name], measure(task, seconds))
    speed = {task.name: rates[task.name] * (task.gflop or 1.0) for task in tasks}
    return [
        Rate(
            task.name,
            threads,
            task.unit,
            rates[task.name],
            speed[task.name] if task.gflop else None,
            task.limit,
            speed[task.name] / speed[task.limit] if task.limit else None,
        )
        for task in tasks
    ]


def told(rate: Rate) -> str:
    speed = "" if rate.gflop_per_second is None else f"{rate.gflop_per_second:,.1f} GFLOP/s"
    share = "" if rate.share_of_limit is None else f"  {100 * rate.share_of_limit:.0f} % of {rate.limit}"
    return f"{rate.threads} threads  {rate.name:<32}{rate.per_second:>14,.2f} {rate.unit + '/s':<12}{speed:>18}{share}"


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Decoding, encoding and loading, beside the machine's limits.")
    parser.add_argument("--video", type=Path, metavar="FILE", help="to decode (default: one is made)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="measured in each round, for each figure")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--no-cosmos", action="store_true", help="leave out Cosmos, which takes minutes on a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    rates: list[Rate] = []
    with tempfile.TemporaryDirectory() as folder:
        video = arguments.video or make_video(Path(folder) / "video.mp4")
        with loading(Path(folder)) as load:
            tasks = [products(), *tokenizers(not arguments.no_cosmos), *decoding(video), *load]
            for threads in arguments.threads:
                for rate in best_rates(tasks, threads, arguments.rounds, arguments.seconds):
                    rates.append(rate)
                    print(told(rate), flush=True)
    if arguments.json:
        load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of the last minute: how busy the machine was
        facts = {"hardware": hardware(torch.device("cpu")), "load_average": load_average, "rounds": arguments.rounds}
        write_json(arguments.json, facts | {"rates": [asdict(rate) for rate in rates]})


if __name__ == "__main__":
    main()
