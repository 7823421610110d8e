"""Context parallelism: the processes of a group share out the time of each row.

A row is cut into twice as many spans as there are processes, and process r holds the r-th span from either end: a
causal score matrix then gives all of them as much to do. Each runs the layers on its own places. Attention gathers the
keys and values of all, and the hidden states are gathered at the end, so that an objective sees whole rows.

    gather    forwards the parts of all processes, backwards the sum over them of the gradient of each part

The trainer takes 1/size of the loss in each process of a group, so the gradient of every weight is the plain sum over
all processes, whether that weight saw a part (layers) or the whole (the head).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

_share: "Share | None" = None
# torch 2.13 renamed both
_ALL_GATHER: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True)
class Share:
    """This process's place in a group whose members take parts of each row. `group` is a process group of torch."""

    group: Any
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """What this process holds of rows of some length.

    Attributes:
        time: the length; rows are padded to `padded`, a multiple of twice the size of the group.
    """

    share: Share
    time: int

    @property
    def span(self) -> int:
        """Places of one of the two spans that each process holds."""
        return math.ceil(self.time / (2 * self.share.size))

    @property
    def padded(self) -> int:
        """The length of a row with its padding."""
        return 2 * self.share.size * self.span

    @property
    def spans(self) -> tuple[range, range]:
        """The places that this process holds, of a padded row."""
        first, last = self.share.rank, 2 * self.share.size - 1 - self.share.rank
        return (
            range(first * self.span, (first + 1) * self.span),
            range(last * self.span, (last + 1) * self.span),
        )

    def pad(self, rows: Tensor, value: int) -> Tensor:
        """Rows [row time] with their padding."""
        return functional.pad(rows, (0, self.padded - self.time), value=value)

    def take(self, rows: Tensor) -> Tensor:
        """This process's places of padded rows [row time ...]."""
        return torch.cat([rows[:, span.start : span.stop] for span in self.spans], dim=1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def whole(self, part: Tensor, axis: int) -> Tensor:
        """The parts of all processes along `axis`, in the order of time, padding included."""
        moved = part.movedim(axis, 0)
        gathered: Tensor = _Gather.apply(moved.reshape(2, self.span, *moved.shape[1:]), self.share)
        return gathered.flatten(0, 1).movedim(0, axis)


@contextmanager
def shared(share: Share | None) -> Iterator[None]:
    """Within, a model's forward pass and the scores of tokens are shared out; with None each does all of it."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def current() -> Share | None:
    """The share that holds now."""
    return _share


def gather_scores(local: Tensor, count: int, share: Share) -> Tensor:
    """Of `count` scores the ones that each process took (see `scores_of`), all in order."""
    each = math.ceil(count / share.size)
    padded = functional.pad(local, (0, 0) * (local.ndim - 1) + (0, each - len(local)))
    whole: Tensor = _GatherInOrder.apply(padded, share)
    return whole[:count]


def scores_of(count: int, share: Share) -> slice:
    """The scores that this process takes, of `count`."""
    each = math.ceil(count / share.size)
    return slice(min(count, share.rank * each), min(count, (share.rank + 1) * each))


class _GatherInOrder(torch.autograd.Function):
    """[place ...] of each process to [process x place ...]."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return _all(local, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed_part(gradients[0], ctx.share), None


class _Gather(torch.autograd.Function):
    """[2 span ...] of each process, its spans from either end, to [2 x process, span ...] in the order of time."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, share: Share) -> Tensor:
        ctx.share = share
        firsts, lasts = _all(local, share).unflatten(0, (-1, 2)).unbind(1)
        return torch.cat((firsts, lasts.flip(0)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        firsts, lasts = gradients[0].chunk(2)
        by_process = torch.stack((firsts, lasts.flip(0)), dim=1)
        return _summed_part(by_process.flatten(0, 1), ctx.share), None


def _all(local: Tensor, share: Share) -> Tensor:
    """What all processes have, one behind another along the first axis."""
    whole = local.new_empty(share.size * len(local), *local.shape[1:])
    _ALL_GATHER(whole, local.contiguous(), group=share.group)
    return whole


def _summed_part(gradient: Tensor, share: Share) -> Tensor:
    """This process's part of the sum over all; in float32 whatever the dtype, which rounds once and not at each."""
    wide = gradient.float().contiguous()
    part = wide.new_empty(len(wide) // share.size, *wide.shape[1:])
    _REDUCE_SCATTER(part, wide, group=share.group)
    return part.to(gradient.dtype)
