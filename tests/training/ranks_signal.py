"""``dreamer`` in each process that torchrun starts for tests/training/test_distributed.py; process 1 gets a signal before a training step.

python ranks_signal.py SIGNUM STEP WORD...
"""

import os
import sys

from dreamer.cli import main
from dreamer.training.distributed import Ranks
from dreamer.training.loop import Trainer

signum, at, *words = sys.argv[1:]
train_step = Trainer.train_step


def signalled(self: Trainer, batches: list) -> dict:
    if Ranks.from_environment().rank == 1 and self.step == int(at):
        os.kill(os.getpid(), int(signum))
    return train_step(self, batches)


Trainer.train_step = signalled
sys.exit(main(words))
