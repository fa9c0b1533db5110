"""Configs and words of the command line, what the player is sent, and the results of other people's runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from dreamer.config import DreamerConfig
from dreamer.evaluation.agent import AgentResult
from dreamer.evaluation.charts import read_metrics
from dreamer.evaluation.video import COPY_LAST_FRAME, RECONSTRUCTION, SHUFFLED_ACTIONS, TRUE_ACTIONS, score_open_loop
from dreamer.pipeline.report import agent_rows, world_model_result
from dreamer.pipeline.results import collect_results
from dreamer.pipeline.run import Run
from dreamer.pipeline.run_files import AgentFile, RunFile, WorldModelFile, read_file
from dreamer.pipeline.runs import _reached, compare
from dreamer.player.images import decode_upload
from dreamer.player.protocol import parse
from dreamer.training.logging import RunLogger
from dreamer.yaml_config import load_config, parse_options, save_config
from fuzz import made
from fuzz.contract import Target, Variant
from fuzz.targets.weights import values, whole

# ---- configs


def _config(folder: Path) -> None:
    (folder / "config.yaml").write_text("seed: 3\n")
    (folder / "words.txt").write_text("seed=3\nphase1.train.steps=10\n")


def _config_variants(folder: Path) -> Sequence[Variant]:
    section = b"phase1:\n  sequence_length: 64  # steps\n  long_every: 4\n  train:\n    steps: 10_000\n    optim: {learning_rate: 3e-4}\n"
    texts = [b"seed: 3\nenv: null\ndata: {recordings: {path: x}}\n", section.replace(b"10_000", b"0x400")]
    words = [b"phase1.train.steps=10\ntokenizer.token_grid=[2, 2]", b"env=null\ndata.recordings={path: x, reader: npy}"]
    return [Variant("file", whole("config.yaml"), texts), Variant("words", whole("words.txt"), words, _read_words)]


def _read_words(folder: Path) -> Any:
    try:
        words = (folder / "words.txt").read_bytes().decode("utf-8", "surrogateescape").splitlines()
        parse_options(words)
        return load_config(DreamerConfig, None, words)
    except ValueError as error:
        if not str(error).isprintable():
            raise RuntimeError(f"not one line: {error}") from error
        raise ValueError(f"{folder}: {error}") from error


def _read_config(folder: Path) -> Any:
    return load_config(DreamerConfig, folder / "config.yaml")


# ---- the player


MESSAGES: list[dict[str, Any]] = [
    {"type": "input", "number": 3, "pressed": [0, 1], "turn": [1.5, -2.0]},
    {"type": "seen", "frame": 4},
    {"type": "restart", "where": "recorded", "episode": 1, "step": 2},
    {"type": "policy", "mode": "sampled"},
    {"type": "settings", "num_steps": 4, "context": 8, "seed": 1, "fps": 20.0, "real": True},
    {"type": "record", "value": True},
]


def _message(folder: Path) -> None:
    (folder / "message").write_text(json.dumps(MESSAGES[0]))


def _message_variants(folder: Path) -> Sequence[Variant]:
    return [
        Variant("text", whole("message"), [json.dumps(message).encode() for message in MESSAGES]),
        *(values("message", json.dumps(message).encode()) for message in MESSAGES),
    ]


def _read_message(folder: Path) -> Any:
    return parse((folder / "message").read_bytes().decode("utf-8", "surrogateescape"))


def _image(folder: Path) -> None:
    (folder / "upload").write_bytes(_encoded("PNG"))


def _encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    picture.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def _image_variants(folder: Path) -> Sequence[Variant]:
    pictures = [_encoded("PNG"), _encoded("PNG", "P"), _encoded("PNG", "I;16"), _encoded("PNG", "RGBA")]
    others = [
        _encoded("JPEG"),
        _encoded("JPEG", "CMYK"),
        _encoded("JPEG", progressive=True),
        _encoded("WEBP"),
        _encoded("WEBP", lossless=True),
    ]
    return [
        Variant("png", lambda data: {"upload": made.png_resealed(data)}, pictures),
        Variant("bytes", whole("upload"), pictures + others),
    ]


def _read_image(folder: Path) -> Any:
    return decode_upload((folder / "upload").read_bytes(), (3, 16, 12))


# ---- results


def _results(folder: Path) -> None:
    path = folder / "run"
    save_config(DreamerConfig.model_validate({"seed": 1, "run_dir": path}), path / "config.yaml")
    truth = torch.full((3, 2, 3, 16, 16), 100, dtype=torch.uint8)
    dreams = {TRUE_ACTIONS: truth + 2, SHUFFLED_ACTIONS: truth + 8, COPY_LAST_FRAME: truth + 8, RECONSTRUCTION: truth}
    rows = []
    for role in ("random", "scripted", "bc", "bc_long", "agent"):
        for mode in (None,) if role in ("random", "scripted") else ("sampled", "argmax"):
            result = AgentResult(role, (0.5, 1.0), (5, 5), (), (1, 2)).to_json()
            rows.append({"label": role, "role": role, "mode": mode, "result": result})
    spent = {"seconds": 30.0, "peak_memory_mb": 1000.0}
    machine = {"CPU": "2 cores", "threads": "2"}
    files = {
        "world_model": {"inputs": {}, "result": score_open_loop(truth, dreams, context=1, fps=8.0).to_json()},
        "agent": {"inputs": {}, "fps": 8.0, "rows": rows},
        "run": {"command": "dreamer demo", "hardware": machine, "stages": {"phase1": spent}, "versions": {}, "revisions": ["abc"]},
    }
    (path / "evaluation").mkdir()
    for name, content in files.items():
        (path / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    (path / "phase1").mkdir()
    metrics = [{"step": step, "flow_loss": 1.0 / step} for step in (1, 2, 3)]
    (path / "phase1" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (path / "report.html").write_text("<p>")


def _result_variants(folder: Path) -> Sequence[Variant]:
    run = Run(load_config(DreamerConfig, folder / "run" / "config.yaml").model_copy(update={"run_dir": folder / "run", "device": "cpu"}))
    evaluation, metrics = "run/evaluation", "run/phase1/metrics.jsonl"
    reads: dict[str, Callable[[Path], Any]] = {
        "world_model.json": lambda _: (read_file(folder / evaluation / "world_model.json", WorldModelFile, ""), world_model_result(run)),
        "agent.json": lambda _: (read_file(folder / evaluation / "agent.json", AgentFile, ""), agent_rows(run)),
        "run.json": lambda _: (read_file(folder / evaluation / "run.json", RunFile, ""), _reached(run), run.seconds("phase1")),
    }
    found = []
    for name, read in reads.items():
        place = f"{evaluation}/{name}"
        content = (folder / place).read_bytes()
        changed = values(place, content)
        found += [Variant(name, whole(place), [content], read), Variant(changed.name, changed.files, [], read)]
    lines = (folder / metrics).read_bytes()
    rows = lines.splitlines()
    change = made.changed_json(json.loads(rows[1]))
    row = Variant("row", lambda data: {metrics: b"\n".join([rows[0], change(data), rows[2], b""])}, [], _read_metrics)
    return [*found, Variant("metrics", whole(metrics), [lines], _read_metrics), row]


def _read_metrics(folder: Path) -> Any:
    """As the report and a resumed training read them."""
    path = folder / "run" / "phase1"
    curves = read_metrics(path / "metrics.jsonl")
    console = Console(file=io.StringIO())
    RunLogger(path, "phase1", total_steps=9, resume_step=3, tensorboard=False, console=console).close()
    return curves


def _read_results(folder: Path) -> Any:
    """As ``dreamer runs`` and ``dreamer results`` read a whole run: too slow for every input."""
    return compare([folder / "run"]).text(), collect_results([folder / "run"]).to_json()


TARGETS = [
    Target("config", _config, _config_variants, _read_config, max_bytes=2048),
    Target("messages", _message, _message_variants, _read_message, names_files=False, max_bytes=5000),
    Target("images", _image, _image_variants, _read_image, names_files=False),
    Target("results", _results, _result_variants, _read_results),
]
