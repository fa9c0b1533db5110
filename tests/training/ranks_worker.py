"""What torchrun starts in tests/training/test_distributed.py: the phases in each of its processes, each in a run of its own.

python ranks_worker.py CONFIG FOLDER PHASE... [key=value...]

After PHASE..., phase 2 once more in FOLDER/skipped, where the last process has a bad gradient in a step, and phase 1 in FOLDER/taken, where
another training is at work.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dreamer.cli import main
from dreamer.config import DreamerConfig
from dreamer.pipeline import Run, run_stage
from dreamer.training.distributed import Ranks, connected
from dreamer.training.phase2 import Phase2
from dreamer.yaml_config import load_config

BAD_STEP, ACCUMULATE = 1, 2  # of the training with a bad gradient


@contextmanager
def bad_gradient() -> Iterator[None]:
    """In phase 2, in the last process: infinite in a single number, in one of a step's batches; the loss stays as it is."""
    forward, ranks, bad = Phase2.forward, Ranks.from_environment(), [BAD_STEP]

    def with_bad_gradient(self: Phase2, batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(self, batch, step, generator)
        if ranks.rank == ranks.world - 1 and step in bad:
            bad.remove(step)
            whole = next(p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor))
            number = whole.flatten()[-1]  # of the last piece
            loss = loss + (number - number.detach()).sqrt()
        return loss, metrics

    Phase2.forward = with_bad_gradient
    try:
        yield
    finally:
        Phase2.forward = forward


def train(config: Path, path: Path, phase: str, settings: list[str]) -> None:
    run_stage(Run(load_config(DreamerConfig, config, [*settings, f"run_dir={path}"])), phase)


def train_each(config: Path, folder: Path, words: list[str]) -> None:
    settings = [word for word in words if "=" in word]
    with connected(Ranks.from_environment(), torch.device("cpu")):
        for phase in [word for word in words if "=" not in word]:
            train(config, folder / phase, phase, settings)
        with bad_gradient():
            train(config, folder / "skipped", "phase2", [*settings, f"phase2.train.accumulate={ACCUMULATE}"])
        del os.environ["DREAMER_TRACEBACK"]
        with (folder / "taken" / f"said_{os.environ['RANK']}").open("w") as said, redirect_stderr(said):
            assert main(["train", "phase1", "--config", str(config), f"run_dir={folder / 'taken'}", *settings]) == 2


if __name__ == "__main__":
    train_each(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
