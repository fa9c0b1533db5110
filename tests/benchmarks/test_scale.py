"""The plan on paper: its arithmetic by hand, and what its words may be."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_plan_by_hand(scale: dict[str, Any]) -> None:
    """10 hours at 10 frames/s are 360,000 frames; 100 TFLOP/s are got of each of 4 GPUs."""
    sizes = {"hours": 10, "fps": 10, "video_rate": 8, "decode_rate": 100, "core_encode_rate": 10, "tokens": 100, "channels": 10}
    sizes |= {"latent_bytes": 2, "row_bytes": 500, "encode_flop": 1, "parameters": 2, "train_flop": 10, "passes": 3}
    sizes |= {"peak": 200, "mfu": 0.5, "gpus": 4, "step_frames": 176, "state_bytes": 20, "checkpoint_bytes": 10, "price": 7}
    rates = scale["parse"]([f"{key}={value}" for key, value in sizes.items()])
    got = {(row.name, row.unit): row.compute(rates) for row in scale["ROWS"]}
    expected = {
        ("frames", "1e6"): 0.36,
        ("video on disk", "TB"): 0.036,  # 36,000 s of 1 MB
        ("the same as RGB frames (never written)", "TB"): 0.248832,  # 691,200 bytes a frame
        ("latents on disk", "TB"): 0.0009,  # 2,500 bytes a frame
        ("latents of `minerl_cosmos` (16 tokens a step of 8 frames), without rows", "TB"): 45_000 * 512 / 1e12,
        ("decoding", "core-hours"): 1,
        ("encoding by `vpt_causal`, on CPUs", "core-hours"): 10,
        ("encoding", "GPU-hours"): 1,  # 0.01 s a frame
        ("cores that keep up with a GPU that encodes", "cores"): 1,
        ("training, phase 1", "1e21 FLOP"): 360_000 * 3 * 10e12 / 1e21,
        ("training, phase 1", "GPU-hours"): 30,  # 0.1 s a frame
        ("training, phase 1", "days"): 30 / 4 / 24,
        ("tokens that all GPUs see", "1e6 tokens/s"): 0.004,  # 40 frames a second
        ("latents that are read", "MB/s"): 0.1,
        ("a training step", "s"): 17.6,
        ("sharded state (FSDP)", "GB/GPU"): 10,
        ("received in a step (FSDP)", "GB/GPU"): 30,  # 3/4 of 8 GB of float32 weights, for each of 4 passes, and of 8 GB of gradients
        ("network, if it hides behind computing", "Gbit/s/GPU"): 240 / 17.6,
        ("a checkpoint", "GB"): 20,
        ("all of it", "money"): 31 * 7,
    }
    assert got == pytest.approx(expected)


def test_every_input_says_what_it_is(scale: dict[str, Any]) -> None:
    rows = scale["rates_table"](scale["Rates"]()).splitlines()[2:]
    kinds = [row.split("|")[3].strip() for row in rows]
    assert len(kinds) == 20 and set(kinds) == {"given", "measured", "counted", "assumed", "example"} and kinds.count("example") == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpu=3", "'gpu=3': expected key=number, with one of hours, fps"),
        ("gpus=x", "expected a number"),
        ("mfu=0", "expected a number above 0"),
    ],
)
def test_bad_words(word: str, said: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), word], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("scale: error: ") and said in done.stderr and done.stderr.count("\n") == 1
