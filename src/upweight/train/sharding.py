"""How a policy lies in several processes, and its gradients summed over them.

- replicated (the default): every process holds the whole model; gradients are summed in one flat exchange a step.
- FSDP2 (`shard`) splits parameters, gradients and optimizer state; its own averaging is turned into a sum.
- a tensor group (train/tensor.py) splits the matrices of the layers, below either of the two.

FSDP and DTensor are imported where they are used: that takes more than a second, which a run of one process need not
spend.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from upweight.core.errors import UserError
from upweight.train import tensor
from upweight.train.parallel import layout

Kind = TypeVar("Kind", bound=Tensor)

_sharded: WeakSet[nn.Module] = WeakSet()
_fsdp: WeakSet[nn.Module] = WeakSet()


def shard(policy: nn.Module, *, fsdp: bool = True) -> nn.Module:
    """Split a policy: its matrices over the tensor group, where there is one, then all of it with FSDP2.

    With FSDP each of its layers is gathered while it runs, the rest stays. A gradient is the sum over processes, not
    FSDP's mean: the trainer divides by the step's weight.
    """
    where = layout()
    if where.tensor.size > 1:
        tensor.split(policy, where.mesh["tensor"])
    _sharded.add(policy)
    if not fsdp:
        return policy
    from torch.distributed.fsdp import FSDPModule, fully_shard

    options: dict[str, Any] = {}
    if where.mesh is not None:
        options = {"mesh": where.rows, "shard_placement_fn": _placement}
    for layer in _layers(policy):
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
    _fsdp.add(policy)
    return policy


def _layers(policy: nn.Module) -> list[nn.Module]:
    """The layers of a policy, or of the model within it."""
    for module in policy.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return list(layers)
    return []


def _placement(parameter: nn.Parameter) -> Any:
    """Where FSDP cuts a parameter: along its first axis, but for those whose first axis is that of its two halves."""
    from torch.distributed.tensor import Shard

    if parameter.ndim < 3:
        return Shard(0)
    width, processes = parameter.shape[2], layout().data.size * layout().context.size
    if width % processes:
        raise UserError(
            f"FSDP with a tensor group cuts the width of the model: {width} over {processes} processes leaves a rest. "
            "Take another number of processes, or --sharding replicated"
        )
    return Shard(2)


def is_sharded(policy: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return policy in _sharded


def gathers_weights(policy: nn.Module) -> bool:
    """Whether a forward pass is an affair of all processes: with FSDP, which gathers weights in it."""
    return policy in _fsdp


def restore_whole(policy: nn.Module, home: nn.Module) -> None:
    """Copy the weights of a sharded policy into an unsharded model of the same names, in all processes."""
    whole = home.state_dict()
    for name, value in policy.state_dict().items():
        whole[name].copy_(gathered(value).view_as(whole[name]))


def replicate(policy: nn.Module) -> None:
    """Give every process the weights of the first."""
    for value in policy.state_dict().values():
        dist.broadcast(value, 0)


def sum_gradients(policy: nn.Module) -> None:
    """Add the gradients of all processes, in one exchange a data type and a group. A missing one counts as zero.

    What FSDP has summed over data and context already is left to the tensor group; what that group splits is left to
    data and context. Weights that are whole in each process of a tensor group have the same gradient in each, but for
    a few whose parts add up (train/tensor.py).
    """
    where, over_rows = layout(), policy in _fsdp
    split, whole = [], []
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None and not over_rows:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is None:
            continue
        if where.tensor.size > 1 and tensor.is_split(parameter):
            split.append(_here(parameter.grad))
            continue
        whole.append(_here(parameter.grad))
        if where.tensor.size > 1 and tensor.in_parts(name):
            whole[-1].mul_(where.tensor.size)
    if not over_rows:
        _exchange(split, None if where.rows is None else where.rows.get_group())
        _exchange(whole, None)
    elif where.tensor.size > 1:
        _exchange(whole, where.mesh.get_group("tensor"))
    if where.tensor.size > 1 and whole:
        torch._foreach_div_(whole, where.tensor.size)


def _exchange(gradients: Sequence[Tensor], group: Any) -> None:
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(same, _unflatten_dense_tensors(flat, same), strict=True):
            gradient.copy_(summed)


def _here(value: Tensor) -> Tensor:
    """What of a tensor lies in this process; a view."""
    local: Any = getattr(value, "to_local", None)
    here: Tensor = value if local is None else local()
    return here


def by_mesh(parameters: Iterable[Kind]) -> list[list[Kind]]:
    """Tensors that may be handled together: those that lie on one mesh, and those on none."""
    groups: dict[object, list[Kind]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def gathered(value: Tensor) -> Tensor:
    """A sharded tensor whole, gathered from all processes; any other as it is."""
    gather = getattr(value, "full_tensor", None)
    whole: Tensor = value if gather is None else gather()
    return whole


def laid_like(whole: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that all processes have, laid out over them as `reference` is, and in its shape.

    What is laid out already stays as it is, and so does what is of another size (a counter of steps).
    """
    if hasattr(whole, "full_tensor") or not whole.ndim or whole.numel() != reference.numel():
        return whole
    whole = whole.reshape(reference.shape)
    if not hasattr(reference, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    mesh, placements = reference.device_mesh, reference.placements
    laid: Tensor = distribute_tensor(whole.to(reference.device), mesh, placements, src_data_rank=None)
    return laid
