"""The training loop: the only place that steps an optimiser. All phases run through it."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from dreamer.interrupt import ECHO, ECHO_OF_SEVERAL, PATIENCE, Interrupted, Stop, deferred
from dreamer.models.transformer import checkpoint_layers, compile_layers
from dreamer.training.checkpoint import (
    STATE,
    checkpoint_path,
    load_weights,
    newest_checkpoint,
    read_state,
    read_tensors,
    save_checkpoint,
    tidy_checkpoints,
)
from dreamer.training.distributed import Parallel, whole
from dreamer.training.logging import RunLogger, SilentLogger
from dreamer.training.optim import (
    OptimConfig,
    learning_rate_scale,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    room_for_optimizer_tensors,
    set_learning_rate,
    without_moments,
)
from dreamer.training.resume_checks import check_same_settings, check_train_state, known_best
from dreamer.training.sharded_state import read_pieces, saved_shapes
from dreamer.types import Config

_log = logging.getLogger(__name__)

MAX_BAD_STEPS = 10  # non-finite steps in a row after which training stops


class BestConfig(Config):
    metric: str  # of a validation, as metrics.jsonl names it, such as val_psnr
    better: Literal["lower", "higher"] = "lower"


class TrainConfig(Config):
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=16, ge=1)  # rows of a batch, of all processes together
    accumulate: int = Field(default=1, ge=1)  # batches a step, whose gradients are averaged
    optim: OptimConfig = OptimConfig()
    ema_decay: float = Field(default=0.999, ge=0, lt=1)  # of the weights that are evaluated and handed on; 0: the raw weights
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; slower on processors without bf16 products
    compile: bool = False  # the transformer layers, by torch.compile: faster steps after a minute or two
    activation_checkpointing: bool = False  # layers are computed again in the backward pass: a third more work, far less memory
    log_every: int = Field(default=20, ge=1)
    validate_every: int = Field(default=500, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)  # checkpoints
    keep_best: BestConfig | None = None  # the checkpoint that is best by a metric stays too; each better validation writes one


class Phase(nn.Module):
    """What the loop trains: the parameters of ``model`` that require gradients. ``model`` is what a checkpoint exports."""

    model: nn.Module
    leaves_out = True  # whether some steps may give no gradient to a parameter that requires one

    def forward(self, batch: Any, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, and metrics (detached scalars). All randomness comes from ``generator``."""
        raise NotImplementedError

    def rate_factor(self, name: str) -> float:
        """What the learning rate of the model's parameter ``name`` is multiplied with."""
        return 1.0

    def before_export(self) -> None:
        """Called with the averaged weights in place, before ``model`` is written to a checkpoint. May set buffers."""

    def carried(self) -> dict[str, Tensor]:
        """What else the next step depends on, besides weights: saved with every checkpoint. ``check_carried`` knows what that may be."""
        return {}

    def carry(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``carried`` gave."""

    def check_carried(self, tensors: dict[str, Tensor], step: int) -> None:
        """``ValueError`` if ``carried`` cannot have given these after ``step`` steps. Rows are those of all processes together."""
        if tensors:
            raise ValueError(f"holds 'carried.{next(iter(tensors))[:200]}'; expected nothing that is carried, in this phase")


@runtime_checkable
class Stream(Protocol):
    """Batches without end."""

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


class TrainingDiverged(ValueError):
    """The loss or its gradient was not finite for several steps in a row. The last checkpoint is intact."""


def step_generator(device: torch.device, *key: object) -> torch.Generator:
    """A noise source that depends on the key (seed, phase, step, ...) alone, so that resuming needs no saved state."""
    return torch.Generator(device).manual_seed(_step_seed(*key))


def _step_seed(*key: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


class Trainer:
    """Trains a phase for ``config.steps`` steps in ``run_dir``; running it again resumes from the newest checkpoint.

    ``settings`` is the phase's resolved config: a run cannot be resumed with another one. ``model_info`` is written beside the
    weights and says how to build the model.
    """

    def __init__(
        self,
        phase: Phase,
        config: TrainConfig,
        run_dir: Path,
        *,
        seed: int,
        settings: dict[str, Any],
        model_info: dict[str, Any],
        parallel: Parallel | None = None,
    ) -> None:
        self.phase, self.config, self.run_dir, self.seed = phase, config, run_dir, seed
        self.settings, self.model_info = settings, model_info
        self.parallel = parallel or Parallel()
        if config.activation_checkpointing:
            checkpoint_layers(phase.model)
        if config.compile:
            compile_layers(phase.model)
        self.forward = self.parallel.wrap(phase)
        self.parameters = {name: p for name, p in phase.model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.optimizers = make_optimizers(self.parameters, config.optim, phase.rate_factor)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema_decay else {}
        self.step, self.num_skipped, self._bad_in_a_row = 0, 0, 0
        self.best: dict[str, Any] | None = None  # step, metric and value of the best checkpoint
        self._saved_step = 0
        self._resumed_from: Path | None = None
        self._unfinished: dict[str, float] | None = None  # metrics of a step whose validation was interrupted
        self._resume()

    def run(
        self,
        batches: Callable[[int], Stream],
        validate: Callable[[RunLogger, int], dict[str, float]] | None = None,
    ) -> None:
        """Train to the end. ``batches(n)`` continues after n batches; ``validate`` sees the averaged weights.

        Raises ``Interrupted`` after SIGINT or SIGTERM, once this step is saved. A validation does not hold that up: the run that goes on
        makes it. Nor does a step of many seconds: it is given up, and the newest checkpoint is what there is.
        """
        config, unfinished = self.config, self._unfinished
        if self.is_finished:
            return
        logged = self.step - (unfinished is not None)
        kind = RunLogger if self.parallel.ranks.is_main else SilentLogger
        logger = kind(self.run_dir, self.run_dir.name, total_steps=config.steps, resume_step=logged)
        echo = ECHO if self.parallel.ranks.world == 1 else ECHO_OF_SEVERAL
        with deferred("saving at the next step", echo) as stop, closing(logger), closing(batches(self.step * config.accumulate)) as stream:
            if unfinished is not None:
                self._finish_step(unfinished, logger, validate, stop)
            while self.step < config.steps and not self._is_stopped(stop):
                with self._given_up(), self._breakable(stop, PATIENCE):
                    metrics = self.train_step([next(stream) for _ in range(config.accumulate)])
                self.step += 1
                self._finish_step(metrics, logger, validate, stop)
            if stop.is_wanted and self._saved_step < self.step:
                logger.sync()
                self.save(is_interim=True)

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Says what there is to go on with if a step takes too long."""
        try:
            yield
        except Interrupted as interruption:
            if not interruption.is_final:
                newest = f"the newest checkpoint is of step {self._saved_step}" if self._saved_step else "there is no checkpoint yet"
                _log.warning("%s: step %d took over %g seconds and was given up; %s", self.run_dir, self.step + 1, PATIENCE, newest)
            raise

    def _is_stopped(self, stop: Stop) -> bool:
        """Whether a signal has reached any of the processes: all stop after the same step."""
        stop.agree(self.parallel.largest(stop.signum or 0))
        return stop.is_wanted

    def _breakable(self, stop: Stop, patience: float = 0.0) -> AbstractContextManager[None]:
        """What one process may give up. Several could not agree where, and end the step or the validation that they are in."""
        return stop.breakable(patience) if self.parallel.ranks.world == 1 else nullcontext()

    @property
    def is_finished(self) -> bool:
        return self.step >= self.config.steps and self._unfinished is None

    def _finish_step(
        self, metrics: dict[str, Any], logger: RunLogger, validate: Callable[[RunLogger, int], dict[str, float]] | None, stop: Stop
    ) -> None:
        """Validate, log and save, where these are due."""
        config, is_best = self.config, False
        logger.advance(self.step)
        is_last = self.step == config.steps
        if validate is not None and (is_last or self.step % config.validate_every == 0):
            if self._is_stopped(stop):  # the run that goes on makes it
                self._unfinished = self._loggable(metrics)
                return
            measured = self._validate(metrics, logger, validate, stop)
            metrics = metrics | measured
            is_best = self._is_best(measured)
        if is_last or self.step % config.log_every == 0 or self.step % config.validate_every == 0:
            logger.log(self.step, self._loggable(metrics))
        if is_last or is_best or (self.step % config.checkpoint_every == 0 and not self._bad_in_a_row):
            logger.sync()
            self.save()

    def _validate(
        self, metrics: dict[str, Any], logger: RunLogger, validate: Callable[[RunLogger, int], dict[str, float]], stop: Stop
    ) -> dict[str, float]:
        self._unfinished = self._loggable(metrics)
        try:
            with self.averaged_weights(), self._breakable(stop):
                measured = validate(logger, self.step)
            measured = self.parallel.main_does(lambda: measured)  # on GPUs a last bit may differ, and with it what is best
        except Interrupted as interruption:
            if not interruption.is_final and checkpoint_path(self.run_dir, self.step, is_interim=True) != self._resumed_from:
                self.save(is_interim=True)
            raise
        self._unfinished = None
        return measured

    def train_step(self, batches: list[Any]) -> dict[str, Any]:
        """Forward, backward, clip, check, step, average: one optimiser step."""
        config, phase = self.config, self.phase
        phase.train()
        total, metrics = 0.0, {}
        buffers = {name: buffer.clone() for name, buffer in phase.named_buffers()}  # the scales of the losses take in what they see
        for micro, batch in enumerate(batches):
            key = (self.seed, self.run_dir.name, self.step, micro)
            generator = step_generator(self.device, *key)
            torch.manual_seed(_step_seed(*key, "dropout"))
            with self.parallel.micro_batch(batch, is_last=micro == len(batches) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss, metrics = self.forward(batch.to(self.device), self.step, generator)
                (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        scale = learning_rate_scale(self.step, config.steps, config.optim)
        set_learning_rate(self.optimizers, scale)
        norm = whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.optim.clip_norm))
        if self._is_finite(total, float(norm)):
            for optimizer in self.optimizers:
                optimizer.step()
            self._update_average()
        else:
            for name, buffer in phase.named_buffers():
                buffer.copy_(buffers[name])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return metrics | {"loss": total, "grad_norm": float(norm), "learning_rate_scale": scale, "skipped_steps": self.num_skipped}

    def _loggable(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Plain numbers; those of a step that was skipped are left out where they are not finite (``skipped_steps`` tells)."""
        values = {name: float(value) for name, value in metrics.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)} if self._bad_in_a_row else values

    def _is_finite(self, loss: float, norm: float) -> bool:
        """Count steps that cannot be used; stop when there are too many in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad_in_a_row = 0
            return True
        self.num_skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"{self.run_dir}: loss {loss:g}, gradient norm {norm:g} at step {self.step}: not finite {MAX_BAD_STEPS} steps in a row; "
                "look for NaN in the data or lower optim.learning_rate. The last checkpoint is intact"
            )
        return False

    def _is_best(self, measured: dict[str, float]) -> bool:
        """Whether this validation is better than all before it. ``ValueError`` if it does not know the metric."""
        wanted = self.config.keep_best
        if wanted is None:
            return False
        if wanted.metric not in measured:
            known = ", ".join(sorted(measured))
            raise ValueError(f"{self.run_dir.name}.train.keep_best.metric is {wanted.metric!r}; a validation here measures {known}")
        value = measured[wanted.metric]
        if not math.isfinite(value) or self._bad_in_a_row:
            return False
        if self.best is not None and (value >= self.best["value"] if wanted.better == "lower" else value <= self.best["value"]):
            return False
        self.best = {"step": self.step, "metric": wanted.metric, "better": wanted.better, "value": value}
        return True

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for name, average in self.ema.items():
            average.lerp_(self.parameters[name], 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model in eval mode with its averaged weights, for validation and export."""
        training = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.ema or training)
        self.phase.train(False)
        try:
            with self.parallel.whole_weights(self.phase):
                yield
        finally:
            self._set(training)
            self.phase.train()

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def save(self, *, is_interim: bool = False) -> Path:
        """Write a checkpoint of this step."""
        with self.averaged_weights(), torch.no_grad():
            self.phase.before_export()
            tensors = ((name, whole(t)) for name, t in self.phase.model.state_dict().items())  # one at a time
            model = {name: t.to("cpu", copy=True) for name, t in tensors if self.parallel.ranks.is_main}
        train = {f"phase.{name}": t for name, t in self.phase.state_dict().items()}
        train |= {f"carried.{name}": self.parallel.gather_rows(t) for name, t in self.phase.carried().items()}
        train |= {f"ema.{name}": t for name, t in self.ema.items()}
        train |= {f"optimizer.{name}": t for name, t in optimizer_tensors(self.optimizers).items()}
        state = {"settings": self.settings, "seed": self.seed, "num_skipped": self.num_skipped, "bad_in_a_row": self._bad_in_a_row}
        state |= {"best": self.best, "unfinished": self._unfinished, "without_moments": without_moments(self.optimizers, self.parameters)}
        path = save_checkpoint(
            self.run_dir,
            self.step,
            model_tensors=model,
            model_info=self.model_info,
            train_tensors=train,
            state=state,
            keep_last=self.config.keep_last,
            best=self.best,
            is_interim=is_interim,
            parallel=self.parallel,
        )
        self._saved_step = self.step
        return path

    def _resume(self) -> None:
        found = self.parallel.main_does(lambda: newest_checkpoint(self.run_dir, set_aside=True))
        if found is None:
            return
        step, path = found
        state = read_state(path)
        check_same_settings(state["settings"] | {"seed": state["seed"]}, self.settings | {"seed": self.seed}, path)
        check = partial(check_train_state, self, path, state, step)
        tensors = self._read_train_state(path, check)
        check(tensors)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        load_weights(self.phase, part("phase."), path)
        self.phase.carry({name: self.parallel.own_rows(t).to(self.device) for name, t in part("carried.").items()})
        load_optimizer_tensors(self.optimizers, part("optimizer."))
        self.ema = {name: t.to(self.device) for name, t in part("ema.").items()}
        self.step, self.num_skipped, self._bad_in_a_row = step, state["num_skipped"], state.get("bad_in_a_row", 0)
        self._saved_step, self._resumed_from, self._unfinished = step, path, state.get("unfinished")
        keep = self.config.keep_best
        self.best = self.parallel.main_does(lambda: known_best(self.run_dir, state, keep and (keep.metric, keep.better)))
        self.parallel.main_does(lambda: tidy_checkpoints(self.run_dir, keep_last=self.config.keep_last, best=self.best))

    def _read_train_state(self, path: Path, check: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
        """What ``save`` wrote, with this number of processes or another one, as it lies in this one. ``check``: called before memory is
        asked for, with tensors without content."""
        if self.parallel.strategy != "fsdp" and (path / STATE).is_file():
            return read_tensors(path / STATE)
        exported = self.phase.model.state_dict().keys()  # in the same folder
        saved = {name: t for name, t in saved_shapes(path, ("",)).items() if name not in exported}
        check(saved)
        moments = {name.removeprefix("optimizer."): t for name, t in saved.items() if name.startswith("optimizer.")}
        own = {f"phase.{name}": torch.zeros_like(t) for name, t in self.phase.state_dict().items()}
        own |= {f"ema.{name}": torch.zeros_like(t) for name, t in self.ema.items()}
        own |= {f"optimizer.{name}": t for name, t in room_for_optimizer_tensors(self.optimizers, moments).items()}
        tensors = {name: own[name] if name in own else torch.zeros_like(t, device="cpu") for name, t in saved.items()}
        read_pieces(path, tensors)
        return tensors
