"""What a training step costs: the real step, run on tensors that have shapes and no content, with every operation counted.

Nothing is computed and nothing is stored, so that models of any size take seconds and little memory. The operations are those of PyTorch
on the CPU; a GPU's differ little. Where the step asks for a value, ``_answer`` gives one.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dreamer.models.transformer import Layer
from dreamer.training.loop import Phase, TrainConfig, Trainer
from dreamer.training.optim import optimizer_tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a training step: its matrix products, attention and convolutions, forward, backward and in the optimiser (a multiply-add is
    two). Memory in bytes.

    saved: what the forward pass of one batch keeps for its backward pass, beside weights. peak: all that is held at the worst moment of the
    step: the above, the batch, and what operations need in between.
    """

    flops: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    saved: int
    peak: int


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


FORMULAS: dict[Any, Callable[..., int]] = {  # FlopCounterMode's, and the CPU's attention, which it does not know
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class StepMeter(TorchDispatchMode):
    """Counts FLOPs and the bytes of live tensors; two that share their memory count once. ``whole_number``: see ``_answer``."""

    def __init__(self, whole_number: int = 1) -> None:
        super().__init__()
        self.whole_number = whole_number
        self.flops = self.live = self.peak = self.saved = self.peak_saved = 0
        self._alive: dict[int, int] = {}  # bytes by storage
        self._unsaved: set[int] = set()  # storages of weights
        self._saved: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _answer(args[0], self.whole_number)
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._overloadpacket not in FORMULAS:
            with self:  # in inference mode, what is made of other operations arrives whole
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def hold_weights(self, module: nn.Module) -> int:
        """Count a module's tensors as held, and never as saved for the backward pass. Returns their bytes."""
        before = self.live
        for tensor in [*module.parameters(), *module.buffers()]:
            self._unsaved.add(self.hold(tensor))
        return self.live - before

    def save(self, tensor: Tensor) -> Tensor:
        """For ``saved_tensors_hooks``."""
        key = self.hold(tensor)
        if key not in self._saved | self._unsaved:
            self._saved.add(key)
            self.saved += self._alive[key]
            self.peak_saved = max(self.peak_saved, self.saved)
        return tensor

    def hold(self, tensor: Tensor) -> int:
        """Count a tensor as held for as long as its memory is in use. Returns the name of that memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key).atexit = False
        return key

    def _release(self, key: int) -> None:
        num_bytes = self._alive.pop(key)
        self.live -= num_bytes
        if key in self._saved:
            self._saved.remove(key)
            self.saved -= num_bytes


def _answer(tensor: Tensor, whole_number: int) -> bool | int | float:
    """What a tensor without content is when a training step asks for its value.

    Every condition holds: there are rows, the loss is finite. Fractions are small: a chance is below every probability, so that where a
    row more or less is drawn, it is more. A whole number is the only one that a step asks for: how many rows are drawn uniformly.
    """
    if tensor.dtype == torch.bool:
        return True
    return 1e-3 if tensor.is_floating_point() else whole_number


def simulate_step(
    build: Callable[[], Phase],
    make_batch: Callable[[], Any],
    config: TrainConfig,
    *,
    step: int = 0,
    whole_number: int = 1,
    carried: Callable[[], dict[str, Tensor]] = dict,
) -> StepCost:
    """The cost of training step ``step`` of the phase that ``build`` makes, on batches such as ``make_batch`` makes.

    carried: makes what the phase carries over from the step before. whole_number: see ``_answer``.
    """
    with torch.device("meta"):
        phase = build()
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # it is slow, but nothing runs
        phase.to_empty(device="cpu")
        phase.carry(carried())
        return measure_step(phase, make_batch(), config, step=step, whole_number=whole_number)


def measure_step(phase: Phase, batch: Any, config: TrainConfig, *, step: int = 0, whole_number: int = 1) -> StepCost:
    """The cost of a training step with state as it is after the first step. Of the ``accumulate`` batches at most two are run: the second
    meets the gradients of the first, and all others cost what it costs."""
    with StepMeter(whole_number) as meter, torch.autograd.graph.saved_tensors_hooks(meter.save, lambda tensor: tensor):
        weights = meter.hold_weights(phase)
        for tensor in [*vars(batch).values(), *phase.carried().values()]:
            meter.hold(tensor)
        config = config.model_copy(update={"compile": False})  # it changes no operation
        trainer = Trainer(phase, config, Path("nowhere"), seed=0, settings={}, model_info={})
        trainer.step = step
        for parameter in trainer.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["foreach"] = True  # all tensors at once, as AdamW does by itself on a GPU; it takes more memory
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        flops = []
        for num_batches in range(1, min(config.accumulate, 2) + 1):
            meter.flops, meter.peak, meter.peak_saved = 0, meter.live, 0
            trainer.train_step([batch] * num_batches)
            flops.append(meter.flops)
        return StepCost(
            flops=flops[0] + (config.accumulate - 1) * (flops[-1] - flops[0]),
            weights=weights,
            gradients=num_bytes(trainer.parameters.values()),
            optimizer=num_bytes(optimizer_tensors(trainer.optimizers).values()),
            average=num_bytes(trainer.ema.values()),
            saved=meter.peak_saved,
            peak=meter.peak,
        )


def in_one_of_several(cost: StepCost, phase: Phase, processes: int, strategy: str) -> StepCost:
    """What one of ``processes`` holds, where ``cost`` is that of its rows with all weights. The peak is at most this: with fsdp it counts
    all gradients as whole."""
    if processes == 1:
        return cost
    if strategy == "ddp":  # gradients travel in buckets of their own
        return dataclasses.replace(cost, gradients=2 * cost.gradients, peak=cost.peak + cost.gradients)
    layers = [num_bytes(p for p in m.parameters() if p.requires_grad) for m in phase.modules() if isinstance(m, Layer)]
    trained = num_bytes(p for p in phase.parameters() if p.requires_grad)
    # put together at a time: what is no layer's, this layer and the next
    together = min(trained, trained - sum(layers) + 2 * max(layers, default=0))
    elsewhere = {name: getattr(cost, name) * (processes - 1) // processes for name in ("gradients", "optimizer", "average")}
    weights = trained * (processes - 1) // processes
    return dataclasses.replace(
        cost,
        weights=cost.weights - weights,
        peak=cost.peak - weights - elsewhere["optimizer"] - elsewhere["average"] + together,
        **{name: getattr(cost, name) - less for name, less in elsewhere.items()},
    )


def num_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
