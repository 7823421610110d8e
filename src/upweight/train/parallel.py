"""Several processes, one step: data parallelism and FSDP2 over torch.distributed, started by torchrun.

    torchrun --nproc-per-node 8 -m upweight.cli run recipe.py --device cuda --sharding fsdp

Each process takes its share of a step's rows. Sums (loss, weight, gradients) are added over all processes and divided
once by the step's weight, so a step does not depend on how many there are. Without torchrun all of this is skipped.

- replicated (the default): every process holds the whole model; gradients are summed in one flat exchange a step.
- sharded (`shard`): FSDP2 splits parameters, gradients and optimizer state; its own averaging is turned into a sum.

FSDP is imported where it is used: that takes more than a second, which a run of one process need not spend.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from upweight.core.errors import UserError

LONGEST_WAIT = timedelta(days=30)
"""How long a process waits for the others: for as long as the first one works alone. Where one of them dies, torchrun
ends the rest."""

FAILURE = "upweight/failure"

_sharded: WeakSet[nn.Module] = WeakSet()
_alone = False


class World(NamedTuple):
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """This process's place; a world of one where no process group stands, and for whoever works alone."""
    if not _alone and dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(device: str = "cpu") -> Iterator[World]:
    """Join the process group that torchrun prepared, if it did: gloo for what is on CPU, nccl for what is on CUDA."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield world()
        return
    if device.startswith("cuda:"):
        raise UserError(f"under torchrun each process takes a device of its own: say --device cuda, not {device}")
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=LONGEST_WAIT)
    try:
        yield world()
    except BaseException as error:
        if not _first_to_fail():
            raise SystemExit(1) from error  # what went wrong was said by another, and this is its echo
        raise
    finally:
        dist.destroy_process_group()


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


def shard(policy: nn.Module) -> nn.Module:
    """Split a policy over all processes with FSDP2: each of its `layers` is gathered while it runs, the rest stays.

    A gradient is the sum over processes, not FSDP's mean: the trainer divides by the step's weight.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    layers = getattr(policy, "layers", None)
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        fully_shard(layer)
    fully_shard(policy)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    _sharded.add(policy)
    return policy


def restore_whole(policy: nn.Module, home: nn.Module) -> None:
    """Copy the weights of a sharded policy into an unsharded model of the same names, in all processes."""
    whole = home.state_dict()
    for name, value in policy.state_dict().items():
        whole[name].copy_(gathered(value))


def is_sharded(policy: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return policy in _sharded


def replicate(policy: nn.Module) -> None:
    """Give every process the weights of the first."""
    for tensor in policy.state_dict().values():
        dist.broadcast(tensor, 0)


def sum_gradients(policy: nn.Module) -> None:
    """Add the gradients of all processes, in one exchange a data type. A missing gradient counts as zero."""
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat)
        for gradient, summed in zip(same, _unflatten_dense_tensors(flat, same), strict=True):
            gradient.copy_(summed)


def reduced(values: Tensor, operation: str) -> Tensor:
    """`values` summed ("sum") or the largest of each ("max") over all processes."""
    dist.all_reduce(values, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return values


def most(value: int) -> int:
    """The largest `value` of all processes."""
    return int(reduced(torch.tensor(value), "max"))


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, gathered from all processes; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


def laid_like(whole: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, laid out over the processes as `reference` is."""
    if not hasattr(reference, "full_tensor") or whole.shape != reference.shape:
        return whole
    # imported here because DTensor takes more than a second, which a run of one process need not spend
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    laid: Tensor = distribute_tensor(whole.to(reference.device), reference.device_mesh, reference.placements)
    return laid
