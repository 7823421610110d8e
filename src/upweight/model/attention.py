"""Causal attention that never crosses the sequences packed into a row, by the fastest way of each device.

Queries, keys and values come as one tensor [row time kv_head slot size]: the slots of a key/value head are its query
heads, then the key, then the value.

- CPU: tiles of plain matrix products, see model/tiled_attention.py.
- CUDA: flex attention, whose block mask skips what the packing makes invisible; torch's flash attention where rows hold
  one sequence each.
- elsewhere, and in compiled layers on a CPU: torch's attention with an explicit mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.rope import turn
from upweight.model.tiled_attention import Tile, attend_in_tiles, tiles_of

SMALLEST_FLEX_HEAD = 16
"""Flex attention on CUDA takes no smaller heads; such toys get an explicit mask."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """On a CPU: the rotary turn at each place, and the parts of the score matrix in which something is visible."""

    rotations: Complex[Tensor, "row time 1 1 pair"]
    parts: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Mask:
    """On other devices, and for the compiler.

    Attributes:
        turns: the rotary turn at each place, as cosine and sine.
        blocks: on CUDA, the block mask of flex attention; None where each row is one sequence.
        seen: elsewhere, which key each query sees; None where each row is one sequence.
    """

    turns: Float[Tensor, "row time 1 1 pair 2"]
    blocks: Any = None
    seen: Bool[Tensor, "row 1 time time"] | None = None


Scope = Tiles | Mask
"""Where the tokens of a batch stand and what each may attend to; made once and shared by all layers."""


def make_scope(
    rotations: Complex[Tensor, "row time 1 1 pair"],
    segments: Int[Tensor, "row time"] | None,
    starts: Int[Tensor, "row time"] | None,
    heads: int,
    prefixes: Int[Tensor, "row time"] | None = None,
    *,
    compiled: bool = False,
) -> Scope:
    """Each token sees itself and what precedes it in its own segment and in that which this one continues.

    Padding sees padding, so that no row is empty.

    Args:
        starts: where that which each token may attend to begins; None like `segments` where each row is one sequence.
        prefixes: None where no segment continues another.
        compiled: whether the layers that take it are compiled: the tiles of a CPU are made for plain torch.
    """
    row, time = rotations.shape[:2]
    kind = rotations.device.type
    if kind == "cpu" and not compiled:
        return Tiles(rotations, tiles_of(row, time, heads, segments, starts, prefixes))
    turns = torch.view_as_real(rotations)
    if segments is None:
        return Mask(turns)
    if kind == "cuda" and 2 * rotations.shape[-1] >= SMALLEST_FLEX_HEAD:
        return Mask(turns, blocks=_block_mask(segments, prefixes))
    past = torch.ones(time, time, dtype=torch.bool, device=rotations.device).tril()
    seen = segments[:, :, None] == segments[:, None, :]
    if prefixes is not None:
        seen |= prefixes[:, :, None] == segments[:, None, :]
    return Mask(turns, seen=(past & seen)[:, None])


def attend(qkv: Float[Tensor, "row time kv_head slot size"], scope: Scope) -> Float[Tensor, "row time features"]:
    """softmax(q k^T / sqrt(size)) v for each head, the heads side by side."""
    if isinstance(scope, Tiles):
        return attend_in_tiles(qkv, scope.rotations, scope.parts)
    group = qkv.shape[3] - 2
    query = turn(qkv[:, :, :, :group], scope.turns).flatten(2, 3).transpose(1, 2)
    key = turn(qkv[:, :, :, group : group + 1], scope.turns)[:, :, :, 0].transpose(1, 2)
    value = qkv[:, :, :, group + 1].transpose(1, 2)
    if scope.blocks is not None:
        out: Tensor = _flex()(query, key, value, block_mask=scope.blocks, enable_gqa=group > 1)
    else:
        shared = group > 1
        if shared and qkv.is_cuda and qkv.dtype == torch.float32:
            # of the kernels for float32, only the one that holds all scores knows shared heads
            key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
            shared = False
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=scope.seen, is_causal=scope.seen is None, enable_gqa=shared
        )
    return out.transpose(1, 2).flatten(2)


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
    out = torch.matmul(torch.softmax(scores, dim=-1), value).view(row, kv_heads, group, time, size)
    return out.permute(0, 3, 1, 2, 4).reshape(row, time, -1)


def _block_mask(segments: Tensor, prefixes: Tensor | None) -> Any:
    # imported here because flex attention loads the compiler, which takes seconds and which a CPU run never needs
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    def shared(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert prefixes is not None
        return visible(row, head, query, key) | ((query >= key) & (prefixes[row, query] == segments[row, key]))

    rows, time = segments.shape
    rule = visible if prefixes is None else shared
    return create_block_mask(rule, rows, None, time, time, device=str(segments.device), _compile=True)


def _flex() -> Callable[..., Any]:
    """Flex attention, compiled by itself unless it stands in a layer that is being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return plain if torch.compiler.is_compiling() else _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # not dynamic=False: after a few shapes the compiler would give up, and the plain form holds all scores
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
