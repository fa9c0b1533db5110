"""What the internet scale would take, on paper: 2,500 hours of video, a world model of 1.6 billion parameters. Nothing is run here.

``python benchmarks/scale.py gpus=256 price=2`` computes it with rates of your own; docs/scale.md holds the table with those below.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

DAY, HOUR = 86_400.0, 3_600.0


def known(value: float, kind: str, unit: str, text: str) -> float:
    """A field with a default; kind: given, measured (here), counted (by code) or assumed."""
    return field(default=value, metadata={"kind": kind, "unit": unit, "text": text})


@dataclass(frozen=True)
class Rates:
    """What the plan is computed from."""

    hours: float = known(2500, "given", "h", "of recordings, 640x360")
    fps: float = known(20, "given", "frames/s", "as Minecraft's recorders write them")
    video_rate: float = known(1.33, "measured", "Mbit/s", "the larger of two contractors' clips, 445 frames; the other: 0.40")
    decode_rate: float = known(2180, "measured", "frames/s", "of that clip, to RGB at 640x360, by one core")
    core_encode_rate: float = known(
        11.3, "measured", "frames/s", "`vpt_causal` (128x128, 64 tokens) on one core; a smaller tokenizer than planned"
    )
    tokens: float = known(256, "given", "tokens", "of a latent step, which is a frame")
    channels: float = known(16, "given", "channels", "of a token")
    latent_bytes: float = known(2, "counted", "bytes", "of a number in a latent store of float16")
    row_bytes: float = known(102, "counted", "bytes", "of a frame's 24 action columns, mask, reward, terminal")
    encode_flop: float = known(0.47, "assumed", "TFLOP/frame", "encoder of 200M parameters on 1,176 tokens: 2 * 200e6 * 1176")
    parameters: float = known(1.594, "counted", "1e9", "dynamics of width 1920, 30 layers, attention over time in every 4th")
    train_flop: float = known(4.15, "counted", "TFLOP/frame", "1,062 TFLOP a GPU and step; activations computed again, bootstrap passes")
    passes: float = known(10, "assumed", "times", "that phase 1 sees each frame")
    peak: float = known(989, "assumed", "TFLOP/s", "of a GPU, dense bf16: the H100's data sheet")
    mfu: float = known(0.4, "assumed", "of the peak", "here 0.52 to 0.61 of a CPU's matrix rate is measured; no GPU was")
    gpus: float = known(64, "assumed", "GPUs", "")
    step_frames: float = known(256, "assumed", "frames", "on a GPU at a time: 4 rows of 64, in every eighth step one of 256")
    state_bytes: float = known(20, "counted", "bytes/parameter", "weights, average, gradients 4 each, optimiser 8, as a dry run says")
    checkpoint_bytes: float = known(20, "counted", "bytes/parameter", "average twice, weights, optimiser 8")
    price: float = known(1, "example", "money/GPU-hour", "not a price: put in yours")


@dataclass(frozen=True)
class Row:
    name: str
    unit: str
    formula: str
    compute: Callable[[Rates], float]


def frames(r: Rates) -> float:
    return r.hours * HOUR * r.fps


def frame_bytes(r: Rates) -> float:
    return r.tokens * r.channels * r.latent_bytes + r.row_bytes


def encode_seconds(r: Rates) -> float:
    return frames(r) * r.encode_flop / (r.peak * r.mfu)


def train_seconds(r: Rates) -> float:
    """Of one GPU."""
    return frames(r) * r.passes * r.train_flop / (r.peak * r.mfu)


def step_seconds(r: Rates) -> float:
    return r.step_frames * r.train_flop / (r.peak * r.mfu)


def seen(r: Rates) -> float:
    """Frames a second, of all GPUs."""
    return frames(r) * r.passes / train_seconds(r) * r.gpus


def step_traffic(r: Rates) -> float:
    """Bytes that a GPU receives in a step of one batch: all weights for each of the two bootstrap passes, the forward and the backward
    pass, then the gradients, in float32 also under autocast (``Parallel.wrap``)."""
    return r.parameters * 1e9 * (4 * 4 + 4) * (r.gpus - 1) / r.gpus


ROWS = (
    Row("frames", "1e6", "hours * 3600 * fps", lambda r: frames(r) / 1e6),
    Row("video on disk", "TB", "hours * 3600 * video_rate / 8", lambda r: r.hours * HOUR * r.video_rate / 8 / 1e6),
    Row("the same as RGB frames (never written)", "TB", "frames * 640 * 360 * 3", lambda r: frames(r) * 640 * 360 * 3 / 1e12),
    Row("latents on disk", "TB", "frames * (tokens * channels * latent_bytes + row_bytes)", lambda r: frames(r) * frame_bytes(r) / 1e12),
    Row(
        "latents of `minerl_cosmos` (16 tokens a step of 8 frames), without rows",
        "TB",
        "frames / 8 * 16 * 16 * latent_bytes",
        lambda r: frames(r) / 8 * 256 * r.latent_bytes / 1e12,
    ),
    Row("decoding", "core-hours", "frames / decode_rate / 3600", lambda r: frames(r) / r.decode_rate / HOUR),
    Row(
        "encoding by `vpt_causal`, on CPUs",
        "core-hours",
        "frames / core_encode_rate / 3600",
        lambda r: frames(r) / r.core_encode_rate / HOUR,
    ),
    Row("encoding", "GPU-hours", "frames * encode_flop / (peak * mfu) / 3600", lambda r: encode_seconds(r) / HOUR),
    Row(
        "cores that keep up with a GPU that encodes",
        "cores",
        "peak * mfu / encode_flop / decode_rate",
        lambda r: frames(r) / encode_seconds(r) / r.decode_rate,
    ),
    Row(
        "training, phase 1",
        "1e21 FLOP",
        "frames * passes * train_flop",
        lambda r: frames(r) * r.passes * r.train_flop / 1e9,
    ),
    Row("training, phase 1", "GPU-hours", "that / (peak * mfu) / 3600", lambda r: train_seconds(r) / HOUR),
    Row("training, phase 1", "days", "GPU-hours / gpus / 24", lambda r: train_seconds(r) / r.gpus / DAY),
    Row("tokens that all GPUs see", "1e6 tokens/s", "frames * passes * tokens / seconds", lambda r: seen(r) * r.tokens / 1e6),
    Row("latents that are read", "MB/s", "tokens/s / tokens * bytes of a frame", lambda r: seen(r) * frame_bytes(r) / 1e6),
    Row("a training step", "s", "step_frames * train_flop / (peak * mfu)", step_seconds),
    Row("sharded state (FSDP)", "GB/GPU", "parameters * state_bytes / gpus", lambda r: r.parameters * r.state_bytes / r.gpus),
    Row("received in a step (FSDP)", "GB/GPU", "parameters * (4 * 4 + 4) * (gpus - 1) / gpus", lambda r: step_traffic(r) / 1e9),
    Row(
        "network, if it hides behind computing",
        "Gbit/s/GPU",
        "that * 8 / seconds of a step",
        lambda r: step_traffic(r) * 8 / 1e9 / step_seconds(r),
    ),
    Row("a checkpoint", "GB", "parameters * checkpoint_bytes; the newest two are kept", lambda r: r.parameters * r.checkpoint_bytes),
    Row("all of it", "money", "(encoding + training) * price", lambda r: (encode_seconds(r) + train_seconds(r)) / HOUR * r.price),
)


def rates_table(rates: Rates) -> str:
    rows = ["| input | value | | what it is |", "|---|---|---|---|"]
    for f in fields(rates):
        value, told = getattr(rates, f.name), f.metadata
        rows.append(f"| `{f.name}` | {value:,.4g} {told['unit']} | {told['kind']} | {told['text']} |")
    return "\n".join(rows)


def plan_table(rates: Rates) -> str:
    rows = ["| result | | unit | formula |", "|---|---|---|---|"]
    rows += [f"| {row.name} | {figure(row.compute(rates))} | {row.unit} | `{row.formula}` |" for row in ROWS]
    return "\n".join(rows)


def days_table(rates: Rates) -> str:
    rows = ["| GPUs | days of phase 1 | GB of state on each | Gbit/s to each |", "|---|---|---|---|"]
    for gpus in (8, 16, 32, 64, 128, 256):
        r = dataclasses.replace(rates, gpus=gpus)
        network = step_traffic(r) * 8 / 1e9 / step_seconds(r)
        rows.append(
            f"| {gpus} | {figure(train_seconds(r) / gpus / DAY)} | {figure(r.parameters * r.state_bytes / gpus)} | {figure(network)} |"
        )
    return "\n".join(rows)


def figure(value: float) -> str:
    """Two digits count: no input is known better."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def parse(words: list[str]) -> Rates:
    """``key=number`` words. Raises ``ValueError`` for another key, and for what is no number above 0."""
    names, given = [f.name for f in fields(Rates)], {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in names:
            raise ValueError(f"{word!r}: expected key=number, with one of {', '.join(names)}")
        try:
            given[key] = float(text)
        except ValueError:
            raise ValueError(f"{word!r}: expected a number") from None
        if not 0 < given[key] < float("inf"):
            raise ValueError(f"{word!r}: expected a number above 0")
    return Rates(**given)


def command_line() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description="What the internet scale takes, from rates that can be changed.")
    options.add_argument("rates", nargs="*", metavar="KEY=NUMBER", help="of the first table")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    try:
        chosen = parse(command_line().parse_args(argv).rates)
    except ValueError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n\n".join([rates_table(chosen), plan_table(chosen), days_table(chosen)]))


if __name__ == "__main__":
    main()
