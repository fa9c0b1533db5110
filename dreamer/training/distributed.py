"""Several processes train one model, as torchrun starts them. What they do together is what one process would do alone.

A batch is spread over them by rows (``dreamer/ops/shares.py``), and their gradients are averaged. ``ddp`` keeps all weights in every
process; ``fsdp`` cuts what is trained, with its gradients, averages and optimiser state, into one piece a process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dreamer.models.transformer import Layer
from dreamer.ops.shares import own_slice, share
from dreamer.types import Config

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # for a process that writes, or that others wait for: one that has died is noticed at once


class ParallelConfig(Config):
    """For several processes, as torchrun starts them. Decides nothing about the weights that come out."""

    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: all weights in every process; fsdp: for models that do not fit one card


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """From RANK and WORLD_SIZE, as torchrun sets them; alone without them."""
        given = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
        return cls(*parse_share(given, "RANK/WORLD_SIZE"))


def refuse_several(verb: str) -> None:
    """``ValueError`` if torchrun has started more than one process for ``verb``."""
    ranks = Ranks.from_environment()
    if ranks.world > 1:
        raise ValueError(
            f"WORLD_SIZE is {ranks.world}: dreamer {verb} is work for one process; run it once, without torchrun (dreamer train and "
            "dreamer pretokenize can be shared)"
        )


def parse_share(given: str, name: str) -> tuple[int, int]:
    """(i, n) from ``i/n``; ``ValueError`` naming ``name`` unless 0 <= i < n."""
    words = given.split("/")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words) or int(words[0]) >= int(words[1]):
        raise ValueError(f"{name} is {given!r}; expected i/n with 0 <= i < n, such as 0/2")
    return int(words[0]), int(words[1])


@contextmanager
def connected(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The processes' group: NCCL between CUDA devices, gloo between CPUs. ``ValueError`` if the others cannot be found."""
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    except (dist.DistError, ValueError, KeyError) as error:
        raise ValueError(
            f"process {ranks.rank} of {ranks.world} cannot join the others ({error}); RANK and WORLD_SIZE are set, so that MASTER_ADDR and "
            "MASTER_PORT have to be, as torchrun does; for a single process, unset them"
        ) from error
    try:
        yield
        dist.barrier()  # nobody leaves while another still needs something
    finally:
        dist.destroy_process_group()


class Parallel:
    """What the training loop asks of ``strategy`` for ``ranks``. Alone there is nothing to it."""

    def __init__(self, ranks: Ranks | None = None, strategy: Literal["ddp", "fsdp"] = "ddp") -> None:
        self.ranks = ranks or Ranks()
        self.strategy = strategy if self.ranks.world > 1 else None
        self._ddp: DistributedDataParallel | None = None

    def wrap(self, phase: Any) -> Callable[..., Any]:
        """What is called in the place of ``phase`` (a ``Phase``). ``fsdp`` replaces the phase's trained parameters by pieces of them."""
        if self.strategy is None:
            return phase
        dropout = [m.p for m in phase.modules() if isinstance(m, nn.Dropout)]
        if dropout:
            raise ValueError(
                f"dropout is {dropout[0]:g}: each process draws its own, so that the run would depend on their number; set it to 0"
            )
        if self.strategy == "ddp":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # the newer name is not yet in PyTorch 2.11
                # buffers need no sending: they are equal already, as they come of what is equal
                self._ddp = DistributedDataParallel(phase, find_unused_parameters=phase.leaves_out, broadcast_buffers=False)
            return self._ddp
        first = next(phase.parameters())
        mesh = init_device_mesh(first.device.type, (self.ranks.world,))
        frozen = {p for p in phase.parameters() if not p.requires_grad}  # kept whole: dreams pass through them many times a step
        for module in phase.modules():
            if isinstance(module, Layer) and any(p not in frozen for p in module.parameters()):
                fully_shard(module, mesh=mesh, ignored_params=frozen)
        root = fully_shard(phase, mesh=mesh, ignored_params=frozen)
        root._get_fsdp_state()._lazy_init()  # now: the first call may be of a layer, in a validation, which would take itself for the root
        return phase

    @contextmanager
    def micro_batch(self, batch: Any, is_last: bool) -> Iterator[None]:
        """For the forward and backward pass of this process's rows. With ddp, gradients are averaged after the step's last one."""
        if self.strategy is None:
            yield
            return
        num_rows = torch.tensor(len(batch))
        dist.all_reduce(num_rows)
        later = self._ddp.no_sync() if self._ddp is not None and not is_last else nullcontext()
        with share(self.ranks.rank, self.ranks.world, int(num_rows)), later:
            yield

    @contextmanager
    def whole_weights(self, phase: nn.Module) -> Iterator[None]:
        """For calls of the phase's parts by themselves: what is no layer's is put together (layers do it when they are called)."""
        if isinstance(phase, FSDPModule):
            phase.unshard()
            try:
                yield
            finally:
                phase.reshard()
        else:
            yield

    def main_does(self, work: Callable[[], T]) -> T:
        """Let the main process do something; all get what it returned. If it fails, all do."""
        if self.ranks.world == 1:
            return work()
        done: list[Any] = [None, None]
        if self.ranks.is_main:
            try:
                done[0] = work()
            except Exception as error:  # raised below, and in all others
                done[1] = error
        dist.broadcast_object_list(done, device=torch.device("cpu"))
        if done[1] is not None:
            raise done[1]
        return done[0]

    def largest(self, number: int) -> int:
        """Of the numbers that the processes give."""
        if self.strategy is None:
            return number
        held = torch.tensor(number)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        """What the processes hold, in one."""
        if self.ranks.world == 1:
            return own
        parts: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(parts, own)
        return {key: value for part in parts for key, value in part.items()}

    def gather_rows(self, values: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
        """The whole batch's rows from those of each process."""
        if self.strategy is None:
            return values
        parts: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(parts, values.cpu())
        whole = torch.empty((sum(map(len, parts)), *values.shape[1:]), dtype=values.dtype)
        for rank, part in enumerate(parts):
            whole[own_slice(rank, self.ranks.world)] = part
        return whole.to(values.device)

    def own_rows(self, values: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "b ..."]:
        """What ``gather_rows`` put together, taken apart again."""
        return values[own_slice(self.ranks.rank, self.ranks.world)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in pieces in the processes, put together; all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
