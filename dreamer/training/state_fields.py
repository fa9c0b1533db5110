"""What may stand in a checkpoint's ``state.json``."""

from __future__ import annotations

import reprlib
import sys
from typing import Any


def state_fault(state: dict[str, Any]) -> str | None:
    """What in ``state.json`` is not of its type, and what was expected."""
    for key, (fits, expected, may_be_absent) in _STATE.items():
        if key in state or not may_be_absent:
            value = state.get(key)
            if not fits(value):
                return f"{key} is {reprlib.repr(value)}, expected {expected}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_best(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"step", "metric", "better", "value"}:
        return False
    is_named = isinstance(value["metric"], str) and value["better"] in ("lower", "higher")
    return is_named and _is_count(value["step"]) and _is_finite(value["value"])


def _is_row(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and "step" not in value and all(map(_is_finite, value.values())))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_STATE = {  # what fits, in words, and whether older checkpoints are without it
    "settings": (lambda value: isinstance(value, dict), "an object", False),
    "seed": (lambda value: type(value) is int, "a whole number", False),
    "num_skipped": (_is_count, "a number of steps", False),
    "step": (_is_count, "a number of steps", True),
    "bad_in_a_row": (_is_count, "a number of steps", True),
    "best": (_is_best, "null, or step, metric, better (lower or higher) and a finite value", True),
    "unfinished": (_is_row, "null, or names of metrics with finite numbers", True),
    "without_moments": (_are_names, "a list of names", True),
}
