"""Phase 3, practice in imagination: ``dreamer train phase3``, which goes on where it stopped::

python train_phase3.py [--config configs/minerl_cosmos.yaml] [--data-path data/pretokenized] [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from dreamer.cli import train_script
from dreamer.training.phase3 import freeze_world_model

__all__ = ["freeze_world_model"]
CONFIG = Path(__file__).parent / "configs" / "minerl_cosmos.yaml"

if __name__ == "__main__":
    sys.exit(train_script("phase3", CONFIG))
