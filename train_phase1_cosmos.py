"""Phase 1, the world model: ``dreamer train phase1``, which goes on where it stopped::

python train_phase1_cosmos.py [--config configs/minerl_cosmos.yaml] [--data-path data/pretokenized] [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from dreamer.cli import train_script

CONFIG = Path(__file__).parent / "configs" / "minerl_cosmos.yaml"

if __name__ == "__main__":
    sys.exit(train_script("phase1", CONFIG))
