"""Seconds of encoding frames and of decoding latents, a clip at once and a frame at a time. See docs/benchmarks.md.

    python benchmarks/tokenizer.py [--threads 2] [--device cuda] [--precision fp32 bf16] [--frames 16] [--json FILE] [--no-cosmos]

The tokenizers are those of the presets and configs; all weights are random: they decide what comes out, not how long it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import DTYPES, Figures, Machine, parser

from dreamer.cli import PRESETS
from dreamer.config import DreamerConfig
from dreamer.models import CausalTokenizer, CosmosTokenizerWrapper
from dreamer.models.cosmos_weights import build_network
from dreamer.yaml_config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
CAUSAL = {"demo": (PRESETS / "demo.yaml", 64), "vpt_causal": (CONFIGS / "vpt_causal.yaml", 128)}  # and the side of a frame


def tokenizers(with_cosmos: bool) -> Iterator[tuple[str, Any]]:
    for name, (path, side) in CAUSAL.items():
        yield name, CausalTokenizer(load_config(DreamerConfig, path).tokenizer, (3, side, side))
    if with_cosmos:
        yield (
            "cosmos_native",
            CosmosTokenizerWrapper(load_config(DreamerConfig, CONFIGS / "minerl_cosmos_native.yaml").cosmos_tokenizer, build_network({})),
        )


def both_ways(machine: Machine, name: str, tokenizer: Any, num_frames: int, *, precision: str, seconds: float) -> list[Figures]:
    """Encoding ``num_frames`` frames of one clip, and decoding their latents. Tokens are those of the latents."""
    tokenizer = tokenizer.to(machine.device).eval()
    frames = torch.randint(0, 256, (1, num_frames, *tokenizer.frame_shape), dtype=torch.uint8, device=machine.device)
    with torch.inference_mode(), torch.autocast(machine.device.type, torch.bfloat16, enabled=precision == "bf16"):
        latents = tokenizer.encode(frames)
        tokens = latents.shape[1] * latents.shape[2]
        options: dict[str, Any] = {"tokens": tokens, "precision": precision, "seconds": seconds}
        found = [
            machine.measure(f"{name}, encode {num_frames}", lambda: tokenizer.encode(frames), **options),
            machine.measure(f"{name}, decode {num_frames}", lambda: tokenizer.decode(latents), **options),
        ]
    print(f"{'':<32}{', '.join(f'{num_frames / figures.seconds:,.1f}' for figures in found)} frames/s", flush=True)
    return found


def command_line() -> argparse.ArgumentParser:
    options = parser("Encoding frames and decoding latents.")
    options.add_argument("--precision", nargs="+", default=["fp32"], choices=list(DTYPES))
    options.add_argument("--frames", nargs="+", type=int, default=[16, 1], help="of a clip that goes through at once")
    options.add_argument("--no-cosmos", action="store_true", help="leave out Cosmos, which takes a minute on a CPU")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line().parse_args(argv)
    machine = Machine(arguments.device, arguments.threads)
    for name, tokenizer in tokenizers(not arguments.no_cosmos):
        for precision in arguments.precision:
            for num_frames in arguments.frames:
                both_ways(machine, name, tokenizer, num_frames, precision=precision, seconds=arguments.seconds)
    machine.write(arguments.json)


if __name__ == "__main__":
    main()
