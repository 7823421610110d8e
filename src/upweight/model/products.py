"""Matrix products by weights, each in the library that is fastest for it.

In float32 torch multiplies with MKL, which on AMD's processors keeps to AVX2 though they have AVX-512. oneDNN, which
torch carries as well and takes for bfloat16 alone, does not: on a Zen 5 core 210 to 250 against 105 GFLOP/s
(docs/log.md). Both add up in float32. What it is called by (`torch.ops.mkldnn`) is what torch's compiler emits.

`packed` puts the weights of a model that only samples into the order in which the products read them.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

LEAST_WORK = 1 << 20
"""Multiplications from which on oneDNN is the faster one in float32: a call of it takes 10 microseconds, MKL's 2."""

NARROW = 512
"""Gradients of a weight with fewer inputs than this, and than outputs, are faster computed as those of its transpose:
at 4,096 tokens, 768 outputs and 128 inputs 183 instead of 113 GFLOP/s."""


class Linear(nn.Linear):
    """y = x W^T + b.

    Attributes:
        packed: the weight in oneDNN's own order, which stands in for `weight` where nothing is trained; None before
            `pack`.
    """

    packed: Tensor | None = None

    def forward(self, x: Float[Tensor, "*n inputs"]) -> Float[Tensor, "*n outputs"]:
        if self.packed is not None:
            return _onednn(x, self.packed, self.bias)
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*n inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "*n outputs"]:
    """x W^T + b, with gradients."""
    if not _takes_onednn(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Linear.apply(x, weight, bias)
        return product
    return _onednn(x, weight, bias)


def mm(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """left right, without gradients."""
    weight = right.t()
    if not _takes_onednn(left, weight):
        return torch.mm(left, right)
    if left.stride(0) == 1 and NARROW > right.shape[1] < len(left):
        return _onednn(weight, left, None).t()
    return _onednn(left, weight, None)


def pack(module: nn.Module, rows: int) -> None:
    """Pack the weights of the `Linear` layers within for products of so many rows, and let go of the weights.

    Only for a model that nobody trains, saves or copies afterwards. Nothing is done where oneDNN does not multiply.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and packs(layer.weight):
            layer.packed = packed(layer.weight, rows)
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


def packs(weight: Tensor) -> bool:
    """Whether products by this weight gain from its own order: in bfloat16 on a CPU that multiplies it."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and multiplies_bfloat16()


def packed(weight: Float[Tensor, "outputs inputs"], rows: int) -> Tensor:
    """The weight in the order in which oneDNN reads it for products of so many rows."""
    order: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return order


def by_packed(x: Float[Tensor, "*n inputs"], order: Tensor) -> Float[Tensor, "*n outputs"]:
    """x W^T by a weight that `packed` has put into order."""
    return _onednn(x, order, None)


class _Linear(torch.autograd.Function):
    """dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradients[0].reshape(-1, weight.shape[0])
        by_input, by_weight, by_bias = ctx.needs_input_grad
        return (
            mm(rows, weight).view_as(x) if by_input else None,
            mm(rows.t(), x.reshape(-1, x.shape[-1])) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)  # not the shards of a distributed tensor
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= LEAST_WORK
        and faster_in_float32()
    )


@functools.cache
def faster_in_float32() -> bool:
    """Whether oneDNN is the faster of the two in float32: on AMD's processors that have AVX-512."""
    information = Path("/proc/cpuinfo")
    if not information.exists() or "AuthenticAMD" not in information.read_text(errors="replace"):
        return False
    return bool(torch.cpu._is_avx512_supported()) and _works(torch.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, and oneDNN takes weights in its own order."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(native) and _works(torch.bfloat16)


def _works(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's products under the names used here."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype)
    try:
        found = (_onednn(x, weight, None), _onednn(x, packed(weight, 2), None))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return all(bool((one == 32).all()) for one in found)
