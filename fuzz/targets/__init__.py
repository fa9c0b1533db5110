"""One harness a reader. A new reader is a ``Target`` in one of these lists, and its name in ``fuzz.driver.TARGET_NAMES``."""

from __future__ import annotations

from fuzz.contract import Target
from fuzz.targets import recordings, stores, texts, weights

TARGETS: dict[str, Target] = {target.name: target for target in [*recordings.TARGETS, *stores.TARGETS, *weights.TARGETS, *texts.TARGETS]}
