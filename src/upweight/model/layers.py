"""RMSNorm (arXiv 1910.07467) and SwiGLU (arXiv 2002.05202), with hand-written gradients on a CPU.

Torch's own backward passes of these two write several temporaries of the size of the activations; on a CPU that costs
as much as a matrix product of a small model. Each function below names its equation and touches memory as often as that
needs. On other devices, and wherever the compiler reads them, they are plain torch, which the compiler fuses.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from upweight.model.precision import widened


def by_hand(x: Tensor) -> bool:
    """Whether the hand-written gradients are the fastest: on a CPU, outside the compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class RmsNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon), over the last axis, in float32 or wider."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
        if x.is_cuda and x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return functional.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)  # one kernel, float32 within
        wide: Tensor = widened(x)
        if by_hand(x) and not torch.is_grad_enabled():
            return _normed(wide, _inverse_size(wide, self.epsilon), self.weight.to(wide.dtype)).to(x.dtype)
        if not by_hand(x) or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            wide = functional.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.epsilon)
            return wide.to(x.dtype)
        normed: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return normed


def _inverse_size(x: Tensor, epsilon: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = _inverse_size(x, epsilon)
        ctx.save_for_backward(x, inverse, weight)
        return _normed(x, inverse, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / size: dx = (w dy - n mean(w dy n)) / size, dw = sum(dy n)."""
        x, inverse, weight = ctx.saved_tensors
        width = x.shape[-1]
        (gradient,) = gradients
        unit = x * inverse
        product = (gradient * unit).reshape(-1, width)
        along = torch.mv(product, weight).mul_(1 / width).view_as(inverse)
        weight_gradient = product.sum(0)
        return (gradient * weight).sub_(unit.mul_(along)).mul_(inverse), weight_gradient, None


def swiglu(gate_up: Float[Tensor, "*n both"]) -> Float[Tensor, "*n half"]:
    """silu(gate) * up, where gate is the first half of the features and up the second."""
    if not by_hand(gate_up) or not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
    gated: Tensor = _SwiGlu.apply(gate_up)
    return gated


class _SwiGlu(torch.autograd.Function):
    """Keeps sigmoid(gate): its exponential is the dear part, and both directions can share it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        ctx.save_for_backward(gate_up, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """With s = silu(gate): d up = dy s; d gate = dy up silu'(gate), silu' = s + sigmoid (1 - s)."""
        gate_up, sigmoid = ctx.saved_tensors
        (gradient,) = gradients
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        gate_gradient, up_gradient = both.chunk(2, dim=-1)
        silu = gate * sigmoid
        torch.mul(gradient, silu, out=up_gradient)
        slope = torch.lerp(silu, torch.ones((), dtype=silu.dtype), sigmoid)
        torch.mul(slope.mul_(up), gradient, out=gate_gradient)
        return both
