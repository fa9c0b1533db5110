"""What torchrun starts in tests/training/test_distributed.py: the phases in each of its processes, each in a run of its own.

python ranks_worker.py CONFIG FOLDER PHASE... [key=value...]
"""

import sys
from pathlib import Path

import torch

from dreamer.config import DreamerConfig
from dreamer.pipeline import Run, run_stage
from dreamer.training.distributed import Ranks, connected
from dreamer.yaml_config import load_config

config, folder, *words = sys.argv[1:]
with connected(Ranks.from_environment(), torch.device("cpu")):
    for phase in [word for word in words if "=" not in word]:
        settings = [word for word in words if "=" in word]
        run_stage(Run(load_config(DreamerConfig, Path(config), [*settings, f"run_dir={folder}/{phase}"])), phase)
