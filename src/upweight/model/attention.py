"""Causal attention that never crosses the sequences packed into a row, by the fastest way of each device.

Queries, keys and values come as one tensor [row time kv_head slot size]: the slots of a key/value head are its query
heads, then the key, then the value. Query heads that share a key fold into the rows of one matrix product.

- CPU: plain matrix products. The scores of a row are written out and the probabilities kept for the gradient; beyond
  `WRITTEN_OUT_SCORES` of them torch's blocked attention takes over, which never holds them.
- CUDA: flex attention, whose block mask skips what the packing makes invisible.
- elsewhere: torch's attention with an explicit mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.rope import rotate

WRITTEN_OUT_SCORES = 1 << 26
"""Scores of one layer (rows x heads x time^2) up to which they are held in memory for the gradient: 256 MB in fp32."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Where the tokens of a batch stand and what each may attend to; made once and shared by all layers.

    Attributes:
        rotations: the rotary turn at each place.
        bias: 0 where a query sees a key and -inf elsewhere; None on CUDA.
        blocks: the block mask of flex attention; None but on CUDA.
        causal_only: whether the bias is no more than causality (no packing).
    """

    rotations: Complex[Tensor, "row time 1 1 pair"]
    bias: Float[Tensor, "rows query key"] | None
    blocks: Any = None
    causal_only: bool = False


def causal_scope(
    rotations: Complex[Tensor, "row time 1 1 pair"], segments: Int[Tensor, "row time"] | None, dtype: torch.dtype
) -> Scope:
    """Each token sees itself and what precedes it in its own segment; padding sees padding, so that no row is empty."""
    time = rotations.shape[1]
    device = rotations.device
    if device.type == "cuda":
        return Scope(rotations, None, None if segments is None else _block_mask(segments), segments is None)
    past = torch.ones(time, time, dtype=torch.bool, device=device).tril()[None]
    seen = past if segments is None else past & (segments[:, :, None] == segments[:, None, :])
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return Scope(rotations, bias, None, segments is None)


def attend(qkv: Float[Tensor, "row time kv_head slot size"], scope: Scope) -> Float[Tensor, "row time features"]:
    """softmax(q k^T / sqrt(size)) v for each head, the heads side by side."""
    row, time, kv_heads, slots, size = qkv.shape
    group = slots - 2
    turned = rotate(qkv[:, :, :, : group + 1], scope.rotations)
    query, key, value = turned[:, :, :group], turned[:, :, group], qkv[:, :, :, group + 1].transpose(1, 2)
    written_out = row * kv_heads * group * time * time <= WRITTEN_OUT_SCORES
    if scope.bias is not None and written_out and qkv.device.type == "cpu":
        seen: Tensor = _Attention.apply(query, key, value, scope.bias)
        return seen.reshape(row, time, -1)
    query = query.reshape(row, kv_heads * group, time, size)
    if qkv.device.type == "cuda" and scope.blocks is not None:
        out = _flex()(query, key, value, block_mask=scope.blocks, enable_gqa=True)
    elif scope.causal_only:
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)
    else:
        assert scope.bias is not None
        mask = scope.bias[:, None].to(query.dtype)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=group > 1)
    return out.transpose(1, 2).reshape(row, time, -1)


def attend_cached(
    query: Float[Tensor, "row kv_head group time size"],
    key: Float[Tensor, "row kv_head slot size"],
    value: Float[Tensor, "row kv_head slot size"],
    bias: Float[Tensor, "row time slot"],
) -> Float[Tensor, "row time features"]:
    """Attention of new tokens over what a cache holds; no gradient."""
    row, kv_heads, group, time, size = query.shape
    scores = torch.matmul(query.reshape(row, kv_heads, group * time, size), key.transpose(-1, -2)).mul_(size**-0.5)
    scores.view(row, kv_heads, group, time, -1).add_(bias[:, None, None])
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out = torch.matmul(probabilities, value).view(row, kv_heads, group, time, size)
    return out.permute(0, 3, 1, 2, 4).reshape(row, time, -1)


class _Attention(torch.autograd.Function):
    """Attention in written-out scores: six matrix products and one softmax, forwards and backwards together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        row, kv_heads, group, time, size = query.shape
        with torch.autocast("cpu", enabled=False):
            queries = query.reshape(row * kv_heads, group * time, size)
            keys, values = (part.to(query.dtype).reshape(row * kv_heads, time, size) for part in (key, value))
            scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(size**-0.5)
            scores.view(row, kv_heads, group, time, time).add_(bias[:, None, None])
            probabilities = torch.softmax(scores, dim=-1)
            out = torch.bmm(probabilities, values)
        ctx.save_for_backward(queries, keys, values, probabilities)
        ctx.shape = query.shape
        return out.view(query.shape).permute(0, 3, 1, 2, 4).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With p = softmax(s): dv = p^T dy, dp = dy v^T, ds = p (dp - sum(p dp)), dq = ds k, dk = ds^T q."""
        queries, keys, values, probabilities = ctx.saved_tensors
        row, kv_heads, _, time, size = ctx.shape
        gradient = gradients[0].permute(0, 2, 3, 1, 4).reshape(queries.shape).to(queries.dtype)
        with torch.autocast("cpu", enabled=False):
            value_gradient = torch.bmm(probabilities.transpose(1, 2), gradient)
            by_probability = torch.bmm(gradient, values.transpose(1, 2))
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, probabilities.dtype)
            by_score = by_score.mul_(size**-0.5)
            query_gradient = torch.bmm(by_score, keys)
            key_gradient = torch.bmm(by_score.transpose(1, 2), queries)
        shape = (row, kv_heads, time, size)
        return query_gradient.view(ctx.shape), key_gradient.view(shape), value_gradient.view(shape), None


def _block_mask(segments: Tensor) -> Any:
    # imported here because flex attention loads the compiler, which takes seconds and which a CPU run never needs
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    rows, time = segments.shape
    return create_block_mask(visible, rows, None, time, time, device=str(segments.device), _compile=True)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
