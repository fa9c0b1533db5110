"""Seconds of a training step of the world model: shortcut forcing with bootstrap, AdamW, averaged weights. See docs/benchmarks.md.

    python benchmarks/training_step.py [--threads 2] [--device cuda] [--compile] [--precision fp32 bf16] [--batch 4] [--length 32 64 256]

A batch is ``--batch`` clips of ``--length`` latent steps, of 16 tokens each; a quarter of the clips learn from two half steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import DTYPES, Figures, Machine, parser
from workload import CONFIG, TOKENS, make_agent, make_batch

from dreamer.losses import ShortcutForcingConfig
from dreamer.models import AgentConfig
from dreamer.training.loop import TrainConfig, Trainer
from dreamer.training.phase1 import Phase1


def make_trainer(device: torch.device, precision: str, is_compiled: bool, config: AgentConfig = CONFIG) -> Trainer:
    """Of phase 1, with the settings that training has by default. It writes nothing."""
    train = TrainConfig.model_validate({"precision": precision, "compile": is_compiled})
    phase = Phase1(make_agent(device, config), ShortcutForcingConfig())
    return Trainer(phase, train, Path("nowhere"), seed=0, settings={}, model_info={})


def training_step(machine: Machine, precision: str, *, rows: int, length: int, is_compiled: bool, seconds: float) -> Figures:
    trainer, batch = make_trainer(machine.device, precision, is_compiled), make_batch(rows, length, machine.device)
    name = f"{rows} x {length} steps{', compiled' if is_compiled else ''}"
    return machine.measure(name, lambda: trainer.train_step([batch]), tokens=rows * length * TOKENS, precision=precision, seconds=seconds)


def command_line() -> argparse.ArgumentParser:
    options = parser("A training step of the world model.")
    options.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    options.add_argument("--batch", type=int, default=4, help="clips")
    options.add_argument("--batch-steps", type=int, metavar="N", help="latent steps in a batch, instead of clips")
    options.add_argument("--length", nargs="+", type=int, default=[32], help="latent steps of a clip")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    machine = Machine(arguments.device, arguments.threads)
    for precision in arguments.precision:
        for length in arguments.length:
            rows = max(arguments.batch_steps // length, 1) if arguments.batch_steps else arguments.batch
            training_step(machine, precision, rows=rows, length=length, is_compiled=arguments.compile, seconds=arguments.seconds)
    machine.write(arguments.json)


if __name__ == "__main__":
    main()
