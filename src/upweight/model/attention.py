"""Causal attention that never crosses the sequences packed into a row, by the fastest way of each device.

Queries, keys and values come as one tensor [row time kv_head slot size]: the slots of a key/value head are its query
heads, then the key, then the value.

- CPU: tiles of plain matrix products, see model/tiled_attention.py. In compiled layers the compiler fuses the rotary
  turn with what lies around it and leaves the tiles to plain torch.
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

from upweight.model import layers
from upweight.model.context import Part
from upweight.model.rope import turn
from upweight.model.tiled_attention import Tile, attend_in_tiles, attend_turned, tiles_of

SMALLEST_FLEX_HEAD = 16
"""Flex attention on CUDA takes no smaller heads; such toys get an explicit mask."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """On a CPU: the rotary turn at each place, and the parts of the score matrix in which something is visible.

    Attributes:
        rotations, turns: the turn as a complex number, and as cosine and sine for the compiler.
        held: what this process holds of each row, where a group shares its time out.
    """

    rotations: Complex[Tensor, "row time 1 1 pair"]
    turns: Float[Tensor, "row time 1 1 pair 2"]
    parts: tuple[Tile, ...]
    held: Part | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """On other devices.

    Attributes:
        turns: the rotary turn at each place, as cosine and sine.
        blocks: on CUDA, the block mask of flex attention; None where each row is one sequence.
        seen: elsewhere, which key each query sees; None where each row is one sequence.
        held: what this process holds of each row, where a group shares its time out.
    """

    turns: Float[Tensor, "row time 1 1 pair 2"]
    blocks: Any = None
    seen: Bool[Tensor, "_ 1 query key"] | None = None
    held: Part | None = None


Scope = Tiles | Mask
"""Where the tokens of a batch stand and what each may attend to; made once and shared by all layers."""


def make_scope(
    rotations: Complex[Tensor, "row time 1 1 pair"],
    segments: Int[Tensor, "row whole"] | None,
    starts: Int[Tensor, "row whole"] | None,
    heads: int,
    dtype: torch.dtype,
    prefixes: Int[Tensor, "row whole"] | None = None,
    held: Part | None = None,
) -> Scope:
    """Each token sees itself and what precedes it in its own segment and in that which this one continues.

    Padding sees padding, so that no row is empty.

    Args:
        starts: where that which each token may attend to begins; None like `segments` where each row is one sequence.
        dtype: of the matrix products.
        prefixes: None where no segment continues another.
        held: what this process holds of each row, of whose places `rotations` are; the rest is of whole, padded rows.
    """
    row, time = rotations.shape[:2]
    kind = rotations.device.type
    turns = torch.view_as_real(rotations)
    if kind == "cpu":
        whole, spans = (time, None) if held is None else (held.padded, held.spans)
        return Tiles(rotations, turns, tiles_of(row, whole, heads, segments, starts, prefixes, dtype, spans), held)
    if segments is None and held is None:
        return Mask(turns)
    if kind == "cuda" and 2 * rotations.shape[-1] >= SMALLEST_FLEX_HEAD:
        return Mask(turns, blocks=_block_mask(row, time, segments, prefixes, held, rotations.device), held=held)
    return Mask(turns, seen=visible(time, segments, prefixes, held, rotations.device), held=held)


def visible(
    time: int,
    segments: Int[Tensor, "row whole"] | None,
    prefixes: Int[Tensor, "row whole"] | None,
    held: Part | None,
    device: torch.device,
) -> Bool[Tensor, "_ 1 query key"]:
    """Which key each query sees, of rows that are all held (`time` places) or in part."""
    keys = torch.arange(time if held is None else held.padded, device=device)
    queries = keys if held is None else held.take(keys[None])[0]
    seen = (queries[:, None] >= keys)[None]
    if segments is not None:
        same = segments[:, queries, None] == segments[:, None, :]
        if prefixes is not None:
            same |= prefixes[:, queries, None] == segments[:, None, :]
        seen = seen & same
    return seen[:, None]


def attend(qkv: Float[Tensor, "row time kv_head slot size"], scope: Scope) -> Float[Tensor, "row time features"]:
    """softmax(q k^T / sqrt(size)) v for each head, the heads side by side."""
    group = qkv.shape[3] - 2
    if isinstance(scope, Tiles):
        if layers.by_hand(qkv):
            return attend_in_tiles(qkv, scope.rotations, scope.parts, scope.held)
        query = turn(qkv[:, :, :, :group], scope.turns * qkv.shape[4] ** -0.5).transpose(1, 2).contiguous()
        key = turn(qkv[:, :, :, group : group + 1], scope.turns)[:, :, :, 0].transpose(1, 2).contiguous()
        seen: Tensor = _attend_turned(query, key, qkv[:, :, :, group + 1].transpose(1, 2).contiguous(), scope)
        return seen
    query = turn(qkv[:, :, :, :group], scope.turns).flatten(2, 3).transpose(1, 2)
    key = turn(qkv[:, :, :, group : group + 1], scope.turns)[:, :, :, 0].transpose(1, 2)
    value = qkv[:, :, :, group + 1].transpose(1, 2)
    if scope.held is not None:
        key, value = scope.held.whole(torch.stack((key, value)), axis=3)
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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_turned(query: Tensor, key: Tensor, value: Tensor, scope: Tiles) -> Tensor:
    # given whole: were the parts taken out of it within the compiler, other parts would mean to compile anew
    return attend_turned(query, key, value, scope.parts, scope.held)


def attend_cached(
    query: Float[Tensor, "row kv_head group time size"],
    key: Float[Tensor, "row kv_head slot size"],
    value: Float[Tensor, "row kv_head slot size"],
    bias: Float[Tensor, "row time slot"],
) -> Float[Tensor, "row time features"]:
    """Attention of new tokens over what a cache holds; no gradient."""
    row, kv_heads, group, time, size = query.shape
    query = query.reshape(row, kv_heads, group * time, size)
    if key.device.type == "cpu" and key.dtype == torch.bfloat16:
        # the keys stand first, since what stands second is rearranged for the product
        products = torch.matmul(key, query.transpose(-1, -2)).transpose(-1, -2)
    else:
        products = torch.matmul(query, key.transpose(-1, -2))
    scores = torch.empty((row, kv_heads, group, time, key.shape[2]), dtype=key.dtype, device=key.device)
    torch.add(bias[:, None, None], products.unflatten(2, (group, time)), alpha=size**-0.5, out=scores)
    out = torch.matmul(torch.softmax(scores, dim=-1).flatten(2, 3), value).view(row, kv_heads, group, time, size)
    return out.permute(0, 3, 1, 2, 4).reshape(row, time, -1)


def _block_mask(
    rows: int, time: int, segments: Tensor | None, prefixes: Tensor | None, held: Part | None, device: torch.device
) -> Any:
    # imported here because flex attention loads the compiler, which takes seconds and which a CPU run never needs
    from torch.nn.attention.flex_attention import create_block_mask

    whole = time if held is None else held.padded
    place = None if held is None else held.take(torch.arange(whole, device=device)[None])[0]

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query if place is None else place[query]) >= key

    def together(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert segments is not None
        at = query if place is None else place[query]
        return (at >= key) & (segments[row, at] == segments[row, key])

    def shared(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert prefixes is not None
        assert segments is not None
        at = query if place is None else place[query]
        return together(row, head, query, key) | ((at >= key) & (prefixes[row, at] == segments[row, key]))

    rule = causal if segments is None else together if prefixes is None else shared
    return create_block_mask(rule, rows, None, time, whole, device=str(device), _compile=True)


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
