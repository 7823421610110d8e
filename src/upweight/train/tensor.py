"""Tensor parallelism: the processes of a group hold parts of the matrices of each layer (arXiv 1909.08053).

    columns    qkv, gate_up: each holds some outputs, of whole heads and of features of the feed-forward network
    rows       out, down: each holds the inputs that come of these; their products are summed over the group

So a layer needs two sums forwards and two backwards, and each process keeps its part of the heads and features between
them. Norms, embedding and head are whole in each process, and the loss is taken in each.

Parameters are DTensors of torch, so that optimizer, clipping and checkpoints know what is split; a forward pass works
on the local parts. The gated halves of `gate_up` [2 ffn, width] get an axis of their own, [2, ffn, width], along whose
second axis they are split.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from upweight.core.errors import UserError
from upweight.model.transformer import Block, Transformer

IN_PARTS = ("query_norm.weight", "key_norm.weight")
"""Weights that are whole in each process of a group but see its own heads alone: their gradients are parts of a sum."""


def split(policy: nn.Module, mesh: Any) -> None:
    """Split the layers of a model of the Llama family over `mesh`, in place.

    Raises UserError where the policy holds no such model, or its heads or features cannot be divided evenly.
    """
    models = [module for module in policy.modules() if isinstance(module, Transformer)]
    if not models:
        raise UserError("tensor parallelism is for models of the Llama family: use --sharding fsdp for others")
    for model in models:
        shape, size = model.config, mesh.size()
        for what, count in (("key/value heads", shape.kv_heads), ("features of the feed-forward network", shape.ffn)):
            if count % size:
                raise UserError(
                    f"{count} {what} cannot be shared out evenly over a tensor group of {size}: take a divisor of both "
                    f"{shape.kv_heads} and {shape.ffn}"
                )
        for layer in model.layers:
            assert isinstance(layer, Block)
            _split_layer(layer, mesh)


def is_split(parameter: Tensor) -> bool:
    """Whether a tensor group holds parts of it."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    return mesh is not None and "tensor" in (mesh.mesh_dim_names or ())


def in_parts(name: str) -> bool:
    """Whether the gradients of this whole weight add up over a tensor group."""
    return name.endswith(IN_PARTS)


def _split_layer(layer: Block, mesh: Any) -> None:
    group = mesh.get_group()
    halves = layer.gate_up.weight.unflatten(0, (2, -1))
    _hold(layer.qkv, _columns, group, weight=_part(layer.qkv.weight, mesh, 0))
    if layer.qkv.bias is not None:
        layer.qkv.bias = _part(layer.qkv.bias, mesh, 0)
    _hold(layer.gate_up, _columns, group, weight=_part(halves, mesh, 1))
    _hold(layer.out, _rows, group, weight=_part(layer.out.weight, mesh, 1))
    _hold(layer.down, _rows, group, weight=_part(layer.down.weight, mesh, 1))
    layer.kv_heads //= mesh.size()


def _hold(linear: nn.Linear, forward: Callable[..., Tensor], group: Any, *, weight: nn.Parameter) -> None:
    linear.weight = weight
    linear.forward = partial(forward, linear, group)  # type: ignore[method-assign]


def _part(whole: Tensor, mesh: Any, axis: int) -> nn.Parameter:
    # imported here because DTensor takes more than a second, which a run of one process need not spend
    from torch.distributed.tensor import DTensor, Shard

    mine = whole.detach().chunk(mesh.size(), axis)[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(mine, mesh, [Shard(axis)], run_check=False))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _columns(linear: nn.Linear, group: Any, x: Tensor) -> Tensor:
    weight, bias = _local(linear.weight), None if linear.bias is None else _local(linear.bias)
    return functional.linear(_Spread.apply(x, group), weight.flatten(0, -2), bias)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rows(linear: nn.Linear, group: Any, x: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(functional.linear(x, _local(linear.weight)), group)
    return summed


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local()
    return local


class _Spread(torch.autograd.Function):
    """The same forwards; backwards the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Sum(torch.autograd.Function):
    """The sum over the group forwards; the same backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
