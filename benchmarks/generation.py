"""Seconds of dreaming on after a recorded context, one clip and many at once. See docs/benchmarks.md.

    python benchmarks/generation.py [--threads 2] [--device cuda] [--compile] [--precision fp32] [--batch 1 64] [--num-steps 4]
    python benchmarks/generation.py --long 10000

16 latent steps after 16 of context, ``--num-steps`` denoising passes each, and one that keeps the result. ``--long`` dreams on for that
many steps instead and tells, for each tenth of the way, what a step took and how much memory was held.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from machine import DTYPES, Figures, Machine, parser
from workload import CONFIG, TOKENS, make_agent, make_batch

from dreamer.imagination import Sampler, SamplerConfig
from dreamer.models import AgentConfig
from dreamer.pipeline.run import peak_memory_mb

CONTEXT, IMAGINED = 16, 16


def make_sampler(device: torch.device, num_steps: int, is_compiled: bool, config: AgentConfig = CONFIG) -> Sampler:
    dynamics = make_agent(device, config).eval().dynamics
    return Sampler(dynamics, SamplerConfig(num_steps=num_steps, compile=is_compiled))


def largest_difference(sampler: Sampler, device: torch.device) -> float:
    """Between the latents that ``sampler`` dreams, which lie about in [-3, 3], and those of the same passes not compiled."""
    batch, found = make_batch(1, CONTEXT + IMAGINED, device), []
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            generator = torch.Generator(device).manual_seed(0)
            arguments = batch.latents[:, :CONTEXT], batch.prev_actions, batch.prev_action_mask
            found.append(sampler.generate(*arguments, generator=generator))
    return (found[0] - found[1]).abs().max().item()


def generation(machine: Machine, sampler: Sampler, precision: str, *, rows: int, seconds: float, name: str) -> Figures:
    batch = make_batch(rows, CONTEXT + IMAGINED, machine.device)

    def run() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=precision == "bf16"):
            sampler.generate(batch.latents[:, :CONTEXT], batch.prev_actions, batch.prev_action_mask)

    found = machine.measure(name, run, tokens=rows * IMAGINED * TOKENS, precision=precision, seconds=seconds)
    print(f"{'':<32}{rows * IMAGINED / found.seconds:,.1f} latent steps/s", flush=True)
    return found


def long_dream(sampler: Sampler, num_steps: int, device: torch.device) -> list[dict[str, Any]]:
    """One dream; for each tenth of it the milliseconds a step took and the peak memory so far."""
    batch, state, tenths = make_batch(1, 1, device), sampler.start(1), []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(num_steps // 10):
            sampler.imagine(state, batch.prev_actions[:, 0])
        took = (time.perf_counter() - began) / (num_steps // 10)
        tenths.append({"steps": state.cache.num_steps, "milliseconds": took * 1e3, "peak_memory_mb": peak_memory_mb()})
        print(f"to step {state.cache.num_steps:>7,}{took * 1e3:>9,.2f} ms a step{tenths[-1]['peak_memory_mb']:>9,.0f} MB", flush=True)
    return tenths


def command_line() -> argparse.ArgumentParser:
    options = parser("Dreaming on after a context.")
    options.add_argument("--precision", nargs="+", default=["fp32"], choices=list(DTYPES))
    options.add_argument("--batch", nargs="+", type=int, default=[1, 64], help="clips at once")
    options.add_argument("--num-steps", type=int, default=4, help="denoising passes a latent step")
    options.add_argument("--long", type=int, metavar="STEPS")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    machine = Machine(arguments.device, arguments.threads)
    sampler = make_sampler(machine.device, arguments.num_steps, arguments.compile)
    if arguments.long:
        machine.write(arguments.json, tenths=long_dream(sampler, arguments.long, machine.device))
        return
    extra = {}
    if arguments.compile:
        extra["largest_difference_to_eager"] = largest_difference(sampler, machine.device)
        print(f"compiled and eager latents differ by at most {extra['largest_difference_to_eager']:.1e}", flush=True)
    for precision in arguments.precision:
        for rows in arguments.batch:
            name = f"{rows} clips{', compiled' if arguments.compile else ''}"
            generation(machine, sampler, precision, rows=rows, seconds=arguments.seconds, name=name)
    machine.write(arguments.json, **extra)


if __name__ == "__main__":
    main()
