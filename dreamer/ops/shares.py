"""One batch, spread over several processes: each holds every ``world``-th row, and what they compute is what one process would.

What is drawn for a batch is drawn for all of its rows, the same in every process, each of which keeps its own (``own_rows``). What is
taken over a batch is taken over all of its rows (``total``, ``mean``, ``holds_any``). Outside of ``share`` a batch is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Num, Shaped
from torch import Tensor


@dataclass(frozen=True)
class _Share:
    rank: int
    world: int
    num_rows: int  # of the whole batch


_share: ContextVar[_Share | None] = ContextVar("share", default=None)


def own_slice(rank: int, world: int) -> slice:
    """The rows of a whole batch that process ``rank`` of ``world`` holds: every kind of row falls evenly to all of them."""
    return slice(rank, None, world)


@contextmanager
def share(rank: int, world: int, num_rows: int) -> Iterator[None]:
    """Inside, batches are this process's rows of one of ``num_rows`` rows. All processes must do the same in it."""
    token = _share.set(_Share(rank, world, num_rows))
    try:
        yield
    finally:
        _share.reset(token)


def whole_size(size: int) -> int:
    """Rows of the whole batch, of which this process holds ``size``."""
    here = _share.get()
    if here is None:
        return size
    assert size == num_own(here.num_rows), (size, here)
    return here.num_rows


def num_own(num_first: int) -> int:
    """How many of the first rows of the whole batch this process holds."""
    here = _share.get()
    return num_first if here is None else len(range(num_first)[own_slice(here.rank, here.world)])


def own_rows(values: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "b ..."]:
    """This process's rows of what was made for the whole batch."""
    here = _share.get()
    return values if here is None else values[own_slice(here.rank, here.world)]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, world: int) -> Tensor:
        ctx.world = world
        out = values.detach().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * ctx.world, None  # gradients are averaged over the processes afterwards, and must be added up


def total(values: Num[Tensor, "*S"]) -> Num[Tensor, "*S"]:
    """The sum of what the processes hold, the same in all of them, bit for bit. Its gradient is what it is to one process, once it is
    averaged over the processes."""
    here = _share.get()
    return values if here is None else _Total.apply(values, here.world)


def mean(values: Num[Tensor, "..."]) -> Num[Tensor, ""]:
    """Over all entries of all rows."""
    if _share.get() is None:
        return values.mean()
    return total(values.sum()) / total(torch.tensor(values.numel(), device=values.device))


def holds_any(mask: Bool[Tensor, "*S"]) -> Bool[Tensor, ""]:
    """Whether anything is True in any process's part."""
    return mask.any() if _share.get() is None else total(mask.sum()) > 0
