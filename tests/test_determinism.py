"""The same settings and the same seed: the same losses. ``python tests/test_determinism.py`` writes tests/golden/smoke.json anew.

That file holds the losses that ``dreamer demo --preset smoke`` had when it was last written. It is renewed together with a change that is
meant to change them, whose commit says why, or with another version of PyTorch; never to quiet a test that nobody understands.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "smoke.json"
PHASES = ("tokenizer", "phase1", "phase2", "bc_long", "phase3")

# Other processors add in another order. The smoke run was repeated with the kernels for AVX2 and for SSE alone (of ATen, MKL and oneDNN),
# with MKL_CBWR=COMPATIBLE, and on two threads. Each bound is about three times what was the worst then: 0.15 % of a total loss, 0.7 % of a
# gradient's norm, 1.6 % of KLs and bootstrap losses, which are small differences, 1.1 % of dreamed rewards, and 0.41 % of all others.
TOLERANCES = {"loss": 0.005, "grad_norm": 0.02, "kl": 0.05, "bootstrap_loss": 0.05, "imagined_reward": 0.035, "imagined_return": 0.035}
TOLERANCE_OF_OTHERS = 0.0125
NOT_COMPARED = {"val_action_gap_db", "val_bc_accuracy", "positive_share"}  # a difference of equals, and counts, which may jump

Losses = dict[str, list[dict[str, float]]]  # of each phase, by row of its metrics.jsonl


def plain(key: str) -> str:
    return key.removeprefix("val_")


def losses_of(run: Path) -> Losses:
    """What is compared of the metrics of all phases."""
    rows = {phase: [json.loads(line) for line in (run / phase / "metrics.jsonl").read_text().splitlines()] for phase in PHASES}
    left_out = NOT_COMPARED | {f"val_{key}" for key in NOT_COMPARED}
    return {phase: [{key: value for key, value in row.items() if key not in left_out} for row in found] for phase, found in rows.items()}


def differences(expected: Losses, got: Losses) -> list[str]:
    """What is not as expected, in words."""
    found = []
    for phase in PHASES:
        steps = [[row["step"] for row in losses[phase]] for losses in (expected, got)]
        if steps[0] != steps[1]:
            found.append(f"{phase}: has rows of the steps {steps[1]}; expected {steps[0]}")
            continue
        for old, new in zip(expected[phase], got[phase], strict=True):
            where = f"{phase}, step {old['step']:.0f}"
            if old.keys() != new.keys():
                found.append(f"{where}: {', '.join(sorted(old.keys() ^ new.keys()))} in one of them alone")
            for key in old.keys() & new.keys():
                if not math.isclose(old[key], new[key], rel_tol=TOLERANCES.get(plain(key), TOLERANCE_OF_OTHERS)):
                    found.append(f"{where}: {key} is {new[key]:.6g}; expected {old[key]:.6g}")
    return found


def test_losses_are_those_of_the_golden_file(smoke_run: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = differences(golden["losses"], losses_of(smoke_run))
    assert not found, "\n".join([*found, "", f"If that is meant: python tests/test_determinism.py. Made with: {golden['made_with']}"])


@pytest.mark.parametrize(("key", "factor"), [("loss", 1.006), ("grad_norm", 0.97), ("val_kl", 1.06), ("value_loss", 0.98)])
def test_a_change_of_a_few_percent_is_seen(key: str, factor: float) -> None:
    golden = json.loads(GOLDEN.read_text())["losses"]
    changed = json.loads(json.dumps(golden))
    changed["phase3"][-1][key] *= factor
    assert len(differences(golden, changed)) == 1 and not differences(golden, golden)
    del changed["phase3"][-1]
    assert differences(golden, changed) == ["phase3: has rows of the steps [3, 6, 9]; expected [3, 6, 9, 12]"]


AGAIN = """
import sys
from dreamer.config import DreamerConfig
from dreamer.pipeline import STAGES, Run
from dreamer.yaml_config import load_config

run = Run(load_config(DreamerConfig, sys.argv[1], [f"run_dir={sys.argv[2]}", "data.num_workers=3"]))
for stage in ("record", "tokenizer", "pretokenize", "phase1", "phase2", "phase3", "bc_long"):
    assert STAGES[stage](run), stage
"""


def made(run: Path) -> dict[str, bytes]:
    """What the stages up to the trainings have made, but for pictures and for TensorBoard's files, which hold the time of day."""
    files = [p for name in ("episodes", "latents", *PHASES) for p in (run / name).rglob("*") if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if not {"media", "tensorboard"} & {*p.parts}}


def test_a_second_run_is_the_same_byte_for_byte(smoke_run: Path, tmp_path: Path) -> None:
    """In another process, from recording to practice in imagination, with three threads that make batches."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", AGAIN, str(smoke_run / "config.yaml"), str(tmp_path / "again")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = made(smoke_run), made(tmp_path / "again")
    assert first.keys() == second.keys() and sum(name.endswith("model.safetensors") for name in first) == 10
    assert [name for name in first if first[name] != second[name]] == []


def renew() -> None:
    from dreamer.cli import main

    with tempfile.TemporaryDirectory() as folder:
        assert main(["demo", "--preset", "smoke", f"run_dir={folder}/smoke", "--no-open"]) == 0
        made_with = {"torch": torch.__version__, "CPU capability": torch.backends.cpu.get_cpu_capability()}
        value: dict[str, Any] = {"made_with": made_with, "losses": losses_of(Path(folder) / "smoke")}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(value, indent=1) + "\n")
    print(f"{GOLDEN.relative_to(ROOT)}: written")


if __name__ == "__main__":
    renew()
