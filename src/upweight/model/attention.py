"""Causal attention that never crosses the sequences packed into a row, by the fastest way of each device.

Queries, keys and values come as one tensor [row time kv_head slot size]: the slots of a key/value head are its query
heads, then the key, then the value.

- CPU: tiles of plain matrix products, see model/tiled_attention.py.
- CUDA: flex attention, whose block mask skips what the packing makes invisible; torch's flash attention where rows hold
  one sequence each.
- elsewhere: torch's attention with an explicit mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.rope import rotate
from upweight.model.tiled_attention import Tile, attend_in_tiles, tiles_of


@dataclass(frozen=True, slots=True)
class Scope:
    """Where the tokens of a batch stand and what each may attend to; made once and shared by all layers.

    Attributes:
        rotations: the rotary turn at each place.
        tiles: on CPU, the parts of the score matrix in which something is visible.
        blocks: on CUDA, the block mask of flex attention; None where each row is one sequence.
        seen: on other devices, which key each query sees; None where each row is one sequence.
    """

    rotations: Complex[Tensor, "row time 1 1 pair"]
    tiles: tuple[Tile, ...] = ()
    blocks: Any = None
    seen: Bool[Tensor, "row 1 time time"] | None = None


def make_scope(
    rotations: Complex[Tensor, "row time 1 1 pair"],
    segments: Int[Tensor, "row time"] | None,
    starts: Int[Tensor, "row time"] | None,
    heads: int,
    prefixes: Int[Tensor, "row time"] | None = None,
) -> Scope:
    """Each token sees itself and what precedes it in its own segment and in that which this one continues.

    Padding sees padding, so that no row is empty. `starts` is where that which each token may attend to begins; None
    like `segments` where each row is one sequence. `prefixes` is None where no segment continues another.
    """
    row, time = rotations.shape[:2]
    kind = rotations.device.type
    if kind == "cpu":
        return Scope(rotations, tiles=tiles_of(row, time, heads, segments, starts, prefixes))
    if segments is None:
        return Scope(rotations)
    if kind == "cuda":
        return Scope(rotations, blocks=_block_mask(segments, prefixes))
    past = torch.ones(time, time, dtype=torch.bool, device=rotations.device).tril()
    seen = segments[:, :, None] == segments[:, None, :]
    if prefixes is not None:
        seen |= prefixes[:, :, None] == segments[:, None, :]
    return Scope(rotations, seen=(past & seen)[:, None])


def attend(qkv: Float[Tensor, "row time kv_head slot size"], scope: Scope) -> Float[Tensor, "row time features"]:
    """softmax(q k^T / sqrt(size)) v for each head, the heads side by side."""
    if scope.tiles:
        return attend_in_tiles(qkv, scope.rotations, scope.tiles)
    row, time, kv_heads, slots, size = qkv.shape
    group = slots - 2
    turned = rotate(qkv[:, :, :, : group + 1], scope.rotations)
    query = turned[:, :, :group].reshape(row, kv_heads * group, time, size)
    key, value = turned[:, :, group], qkv[:, :, :, group + 1].transpose(1, 2)
    if scope.blocks is not None:
        out = _flex()(query, key, value, block_mask=scope.blocks, enable_gqa=True)
    else:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=scope.seen, is_causal=scope.seen is None, enable_gqa=group > 1
        )
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


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
