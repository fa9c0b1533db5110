"""What a run writes down while it trains: metrics.jsonl, TensorBoard, pictures and videos, and a progress bar.

``metrics.jsonl`` holds one JSON object a line, ``{"step": 100, "loss": 0.25, ...}``, and nothing that differs between two equal runs (no
clock): equal runs write equal files.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamer.data.files import fsync_path
from dreamer.evaluation.media import encode_gif, encode_mp4, encode_png, write_atomic

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LINES = 10.0  # where the output is no terminal
MAX_TENSORBOARD_FPS = 50.0


class RunLogger:
    """Writes below ``run_dir``, which belongs to one run of one phase.

    ``metrics.jsonl``, ``media/<name>_<step>.png|mp4`` and ``tensorboard/``. ``resume_step`` is the last step that the checkpoint to resume
    from has behind it: rows of later steps are dropped, since they will be written again; 0 starts afresh. Use as a context manager or
    call ``close``.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        name: str,
        *,
        total_steps: int,
        resume_step: int = 0,
        tensorboard: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= resume_step <= total_steps:
            raise ValueError(f"RunLogger {name!r}: resume_step is {resume_step}; expected 0 to total_steps = {total_steps}")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / "metrics.jsonl"
        for folder in (self.run_dir, self.run_dir / "media"):
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        _truncate(self.metrics_path, resume_step)
        is_new = not self.metrics_path.exists()
        self._metrics = self.metrics_path.open("ab", buffering=0)  # what a full disk refuses must not wait to be refused again
        if is_new:
            fsync_path(self.run_dir)  # rows on the disk are of no use in a file without a name
        self._writer = _summary_writer(self.run_dir / "tensorboard", resume_step) if tensorboard else None
        self._progress = ProgressDisplay(name, total_steps, resume_step, console or Console(file=sys.stderr), clock)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """One row of numbers. A NaN or an infinity is refused with its key, before anything of the row is written."""
        row = {key: _finite(step, key, value) for key, value in values.items()}
        self._write(json.dumps({"step": step, **row}).encode() + b"\n")
        if self._writer:
            for key, value in row.items():
                self._writer.add_scalar(key, value, step)
        self._progress.show(row)
        self._progress.advance(step)

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._metrics.write(line) :]
        except OSError as error:
            error.filename = str(self.metrics_path)
            raise

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` steps done; cheap enough for every step."""
        self._progress.advance(step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> Path:
        data = encode_png(image)
        if self._writer:
            self._writer.add_image(name, image, step, dataformats="HWC")
        return write_atomic(self._media_path(step, name, "png"), data)

    def video(self, step: int, name: str, frames: UInt8[np.ndarray, "F H W C"], fps: float) -> Path:
        data = encode_mp4(frames, fps)
        if self._writer and self._writer.file_writer:
            # SummaryWriter.add_video wants moviepy; an encoded GIF in an image summary is what it would write.
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

            gif = encode_gif(frames, min(fps, MAX_TENSORBOARD_FPS))
            picture = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=gif)
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)
        return write_atomic(self._media_path(step, name, "mp4"), data)

    def print(self, message: str) -> None:
        """A line for people, above the progress bar."""
        self._progress.print(message)

    def sync(self) -> None:
        """Wait until the rows are on the disk: a checkpoint must not outlive the metrics of its steps."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Flush everything to disk. May be called twice."""
        if self._metrics.closed:
            return
        self._progress.close()
        if self._writer:
            self._writer.close()
        os.fsync(self._metrics.fileno())
        self._metrics.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _media_path(self, step: int, name: str, suffix: str) -> Path:
        return self.run_dir / "media" / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}_{step:08d}.{suffix}"


class SilentLogger(RunLogger):
    """Of a process that leaves the writing to another one."""

    def __init__(self, run_dir: str | os.PathLike[str], name: str, *, total_steps: int, resume_step: int = 0) -> None:
        self.run_dir = Path(run_dir)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        for key, value in values.items():
            _finite(step, key, value)  # all end, where the one that writes does

    def advance(self, step: int) -> None: ...

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> Path:
        return self._media_path(step, name, "png")

    def video(self, step: int, name: str, frames: UInt8[np.ndarray, "F H W C"], fps: float) -> Path:
        return self._media_path(step, name, "mp4")

    def print(self, message: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class ProgressDisplay:
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds and one at the end. ``began``: what ``clock`` said
    when the work began (default: now)."""

    def __init__(
        self, name: str, total_steps: int, first_step: int, console: Console, clock: Callable[[], float], began: float | None = None
    ) -> None:
        self._name, self._total, self._first, self._console, self._clock = name, total_steps, first_step, console, clock
        self._step, self._shown = first_step, ""
        self._began = self._last_line = clock() if began is None else began
        self._printed_step: int | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=console)
            self._task = self._bar.add_task(name, total=total_steps, completed=first_step, shown="")
            self._bar.start()

    def show(self, row: Mapping[str, float]) -> None:
        """Keep the loss, or else the first number, beside the bar."""
        key = "loss" if "loss" in row else next(iter(row), None)
        if key is not None:
            self._shown = f"{key} {row[key]:.4g}"

    def advance(self, step: int) -> None:
        self._step = step
        if self._bar:
            self._bar.update(self._task, completed=step, shown=self._shown)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
            self._line()

    def print(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        elif self._step > self._first:
            self._line()

    def _line(self) -> None:
        if self._printed_step == self._step:
            return
        self._printed_step, self._last_line = self._step, self._clock()
        elapsed, done = self._last_line - self._began, self._step - self._first
        left = _clock_time(elapsed / done * (self._total - self._step)) if done else "?"
        place = f"{self._step}/{self._total} ({100 * self._step / max(1, self._total):.0f} %)"
        self.print(f"{self._name}: {place}, {_clock_time(elapsed)} passed, {left} left  {self._shown}".rstrip())


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _finite(step: int, key: str, value: Any) -> float:
    if key == "step":
        raise ValueError("metrics: the key 'step' is taken by the row itself; expected another name")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metrics: {key!r} at step {step} is {value!r}; expected one number") from error
    if not math.isfinite(number):
        raise ValueError(f"metrics: {key!r} is {number} at step {step}; expected a finite one. Lower the learning rate or look at the data")
    return number


def _truncate(path: Path, resume_step: int) -> None:
    """Keep the rows up to ``resume_step``. A last line that a crash cut off goes too; any other broken line is an error."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut off, or is empty
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise TypeError(f"step is {reprlib.repr(step)}, expected a whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(f"{path}:{number}: not a metrics row ({what}); repair the line or move the file away") from error
        if 0 < resume_step >= step:
            kept.append(line + b"\n")
    data = b"".join(kept)
    if data != path.read_bytes():
        write_atomic(path, data)


def _summary_writer(directory: Path, resume_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # imports for seconds: only where it is wanted

    return SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)
