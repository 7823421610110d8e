"""Several processes, one step, over torch.distributed: started by torchrun.

    torchrun --nproc-per-node 8 -m upweight.cli run recipe.py --device cuda --sharding fsdp

Each process takes its share of a step's rows. Sums (loss, weight, gradients) are added over all processes and divided
once by the step's weight, so a step does not depend on how many there are. Without torchrun all of this is skipped.

Processes form a mesh of three axes, of which the first is what the other two leave:

    data      each takes other rows of a step
    context   they take parts of the same rows (model/context.py)
    tensor    they hold parts of the same matrices (train/tensor.py)

Weights are laid out in one of two ways over data and context (train/sharding.py): replicated, where gradients are
summed in one flat exchange a step, or with FSDP2, which splits parameters, gradients and optimizer state.
"""

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.model.context import Share

LONGEST_WAIT = timedelta(days=30)
"""How long a process waits for the others: for as long as the first one works alone. Where one of them dies, torchrun
ends the rest."""

FAILURE = "upweight/failure"
AXES = ("data", "context", "tensor")

Item = TypeVar("Item")
Result = TypeVar("Result")


class World(NamedTuple):
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1


ALONE = World()


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh of the processes. A group that is None is that of all processes.

    Attributes:
        mesh: torch's DeviceMesh of the axes data, context and tensor; None where there is data alone.
        data: this process's place among those that read other rows.
        rows: the mesh of data and context in one axis, of those that hold the same parts of matrices.
        data_group: those that hold the same parts of rows and matrices.
    """

    mesh: Any = None
    rows: Any = None
    data: World = ALONE
    context: World = ALONE
    tensor: World = ALONE
    data_group: Any = None

    @property
    def share(self) -> Share | None:
        """What of each row this process takes; None for all of it."""
        return None if self.context.size == 1 else Share(self.mesh.get_group("context"), *self.context)


_alone = False
_layout: Layout | None = None


def world() -> World:
    """This process's place; a world of one where no process group stands, and for whoever works alone."""
    if not _alone and dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def layout() -> Layout:
    """The mesh of the processes."""
    if _alone or _layout is None:
        return Layout(data=world())
    return _layout


def readers() -> World:
    """Which share of a step's rows this process reads, of how many. Those that share out rows or matrices read the
    same."""
    return layout().data


@contextmanager
def joined(machine: Machine | None = None) -> Iterator[World]:
    """Join the process group that torchrun prepared, if it did: gloo for what is on CPU, nccl for what is on CUDA.

    Raises UserError where the processes cannot be laid out as the machine says.
    """
    machine = machine or Machine()
    if dist.is_available() and dist.is_initialized():
        yield world()
        return
    size, together = int(os.environ.get("WORLD_SIZE", "1")), machine.tensor * machine.context
    if size % together:
        raise UserError(
            f"tensor {machine.tensor} and context {machine.context} need a multiple of {together} processes, but there "
            f"{'is' if size == 1 else 'are'} {size}: start as many with torchrun --nproc-per-node"
        )
    if size <= 1:
        yield world()
        return
    device = machine.device
    if device.startswith("cuda:"):
        raise UserError(f"under torchrun each process takes a device of its own: say --device cuda, not {device}")
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=LONGEST_WAIT)
    try:
        _lay_out(machine)
        yield world()
    except BaseException as error:
        if not _first_to_fail():
            raise SystemExit(1) from error  # what went wrong was said by another, and this is its echo
        raise
    finally:
        _forget_layout()
        dist.destroy_process_group()


def _lay_out(machine: Machine) -> None:
    global _layout
    if machine.tensor * machine.context == 1:
        return
    # imported here because a run of one process need not spend the second that it takes
    from torch.distributed.device_mesh import init_device_mesh

    shape = (dist.get_world_size() // (machine.tensor * machine.context), machine.context, machine.tensor)
    mesh = init_device_mesh(torch.device(machine.device).type, shape, mesh_dim_names=AXES)
    data, context, tensor = (World(mesh.get_local_rank(axis), mesh[axis].size()) for axis in AXES)
    _layout = Layout(mesh, mesh["data", "context"]._flatten("rows"), data, context, tensor, mesh.get_group("data"))


def _forget_layout() -> None:
    global _layout
    _layout = None


def _first_to_fail() -> bool:
    """Whether no other process of the group has failed before; asked once by each that fails."""
    mine = str(dist.get_rank())
    try:
        return bool(dist.distributed_c10d._get_default_store().compare_set(FAILURE, "", mine).decode() == mine)
    except RuntimeError:  # the keeper of the store has gone: nobody can be asked, and saying it twice beats silence
        return True


@contextmanager
def alone() -> Iterator[None]:
    """Work that this process does while the others wait: within, it is a world of one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def told(message: Any = None) -> Any:
    """What the first process says, in all of them. Each calls it; only the first one's `message` counts."""
    if world().size == 1:
        return message
    box = [message]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def everyone(message: Any) -> list[Any]:
    """What each process says, by rank, in all of them."""
    said = [message] * world().size
    if world().size > 1:
        dist.all_gather_object(said, message)
    return said


def shared_out(
    items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]], *, alike: Callable[[Item], Hashable]
) -> list[Result]:
    """One result for each item, in all processes, each of which does its share of the work.

    Args:
        work: makes the results of some items, in their order.
        alike: items of one value go to one process: the one that samples a prompt twice tells the two apart.
    """
    place = world()
    owners: dict[Hashable, int] = {}
    shares: list[list[int]] = [[] for _ in range(place.size)]
    for index, item in enumerate(items):
        shares[owners.setdefault(alike(item), len(owners) % place.size)].append(index)
    done = everyone(work([items[index] for index in shares[place.rank]]))
    by_index = {
        index: result
        for share, results in zip(shares, done, strict=True)
        for index, result in zip(share, results, strict=True)
    }
    return [by_index[index] for index in range(len(items))]


def reduced(values: Tensor, operation: str, group: Any = None) -> Tensor:
    """`values` summed ("sum") or the largest of each ("max") over a group; None is that of all processes."""
    dist.all_reduce(values, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=group)
    return values


def most(value: int) -> int:
    """The largest `value` of all processes."""
    return int(reduced(torch.tensor(value), "max"))
