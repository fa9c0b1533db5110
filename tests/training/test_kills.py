"""Real processes, killed and stopped at many moments in every stage: tests/training/kills.py says how, ``make kill`` does more of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def kills(*words: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "training" / "kills.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_stages_that_are_killed_end_with_the_same_bytes() -> None:
    result = kills("--kills", "16", "--seed", "1")
    assert result["problems"] == []
    told = {stage: sum(found.values()) for stage, found in result["stages"].items()}
    assert told.pop("evaluate world-model") == told.pop("evaluate agent") == 1 and set(told.values()) == {2} and result["kills"] == 16
    assert result["kinds"].keys() >= {"step", "validation", "resume", "checkpoint", "episode"}


@pytest.mark.slow
def test_stages_that_are_stopped_save_and_end_with_the_same_bytes() -> None:
    result = kills("--signals")
    assert result["problems"] == []
    told = {name: scenario["said"] for name, scenario in result["scenarios"].items()}
    assert all("run the same command again to go on" in said for said in told.values())
    announced = [name for name, said in told.items() if "once more to stop at once" in said]
    assert set(told) - set(announced) == {"SIGTERM while it resumes"}  # nothing to save yet: it ends at once
    newest = {name: scenario["newest"] for name, scenario in result["scenarios"].items()}
    assert newest["SIGTERM between steps"] == "interim_step_00000003"  # no checkpoint was due there
    assert newest["SIGTERM in a validation"] == "interim_step_00000003"  # which the next run makes
    assert newest["SIGINT in the last validation"] == "interim_step_00000007"
    assert newest["SIGTERM in a checkpoint"] == "step_00000003"  # was finished
    assert newest["SIGINT twice in a checkpoint"] is None  # was not
