"""What the benchmarks share: how fast this machine multiplies matrices, how long something takes, how many operations it is.

The share of the matrix rate is what counts between machines: the rate is measured in the same run, at the same load.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamer.pipeline.run import hardware, peak_memory_mb, write_json
from dreamer.pipeline.step_cost import StepMeter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices


@dataclass(frozen=True)
class Figures:
    """One workload. ``seconds`` is the best of its runs, ``share`` is of the matrix rate in this precision."""

    name: str
    precision: str
    seconds: float
    median_seconds: float
    runs: int
    tokens_per_second: float  # latent tokens, N a latent step
    flops: int  # counted, of one run: a multiply-add is two
    flops_per_second: float
    share: float
    peak_memory_mb: float  # of the process so far; on a GPU, of this workload


class Machine:
    """A device, its matrix rates (FLOP/s by precision) and the figures measured on it."""

    def __init__(self, device: str, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.matrix_rates = {name: matrix_rate(dtype, self.device) for name, dtype in DTYPES.items()}
        self.figures: list[Figures] = []
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {name}" for name, rate in self.matrix_rates.items())
        print(f"matrix products: {rates}; {torch.get_num_threads()} threads", flush=True)

    def measure(self, name: str, run: Callable[[], Any], *, tokens: int, precision: str, seconds: float) -> Figures:
        """Call ``run``, which works on ``tokens`` latent tokens, for about ``seconds``; print and keep what it took."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = timed(run, self.device, seconds)
        peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else peak_memory_mb()
        best, flops = min(times), counted_flops(run)
        found = Figures(
            name=name,
            precision=precision,
            seconds=best,
            median_seconds=statistics.median(times),
            runs=len(times),
            tokens_per_second=tokens / best,
            flops=flops,
            flops_per_second=flops / best,
            share=flops / best / self.matrix_rates[precision],
            peak_memory_mb=peak,
        )
        self.figures.append(found)
        print(told(found), flush=True)
        return found

    def write(self, path: Path | None, **more: Any) -> None:
        if path is not None:
            write_json(
                path,
                {"hardware": hardware(self.device), "matrix_rates": self.matrix_rates, "figures": list(map(vars, self.figures))} | more,
            )


def matrix_rate(dtype: torch.dtype, device: torch.device, runs: int = 8) -> float:
    """FLOP/s of the fastest of some products of large square matrices."""
    size = SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device, seconds=0, at_least=runs))


def timed(run: Callable[[], Any], device: torch.device, seconds: float, at_least: int = 3) -> list[float]:
    """Wall-clock seconds of each run, after two that are not counted: they compile, and fill caches."""
    times: list[float] = []
    while len(times) < 2 + at_least or sum(times[2:]) < seconds:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return times[2:]


def counted_flops(run: Callable[[], Any]) -> int:
    """Of matrix products, attention and convolutions. Compiled code is counted as what it was compiled from."""
    with torch.compiler.set_stance("force_eager"), StepMeter() as meter:
        run()
    return meter.flops


def told(figures: Figures) -> str:
    f = figures
    took = f"{f.seconds * 1e3:>9,.1f} ms (median {f.median_seconds * 1e3:,.1f}){f.tokens_per_second:>9,.0f} tokens/s"
    work = f"{f.flops / 1e9:>8,.1f} GFLOP{f.flops_per_second / 1e9:>8,.1f} GFLOP/s{f.share:>6.0%} of the matrix rate"
    return f"{f.name:<24}{f.precision}{took}{work}{f.peak_memory_mb:>7,.0f} MB"


def parser(description: str, *, compiles: bool = False) -> argparse.ArgumentParser:
    """With the options that every benchmark of a model has; ``compiles``: it can compile it, too."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice without it")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument("--seconds", type=float, default=8.0, help="measured for each figure")
    if compiles:
        options.add_argument("--compile", action="store_true", help="torch.compile, which takes a minute or two first")
    return options
