"""Attention on a CPU: plain matrix products over tiles of the score matrix, gradient by hand.

    s = q k^T / sqrt(size) + bias,  p = softmax(s),  y = p v
    dv = p^T dy,  dp = dy v^T,  ds = p (dp - sum(p dp)),  dq = ds k / sqrt(size),  dk = ds^T q / sqrt(size)

A tile is some rows of the batch, `QUERIES` queries and the keys that any of them can see: from the beginning of the
first query's sequence to the last query. What the future and other sequences of the row hold is mostly never computed.
Query heads that share a key fold into the rows of one product. A tile's scores stay in the processor's cache, which is
where most of the speed comes from: untiled, the same products take about three times as long, and torch's own attention
1.3 to 1.6 times (docs/log).

Up to `KEPT_SCORES` the probabilities are kept for the gradient, beyond they are computed again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

QUERIES = 64
"""Queries of a tile."""

TILE_SCORES = 1 << 18
"""About how many scores a tile holds: 1 MB in fp32."""

KEPT_SCORES = 1 << 26
"""Scores of one layer up to which probabilities are kept for the gradient: 256 MB in fp32."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of the score matrix: rows of the batch, queries, keys, and what is added to their scores (0 or -inf)."""

    rows: slice
    queries: slice
    keys: slice
    bias: Float[Tensor, "rows 1 1 query key"]


def tiles_of(
    row: int,
    time: int,
    heads: int,
    segments: Int[Tensor, "row time"] | None,
    starts: Int[Tensor, "row time"] | None,
    prefixes: Int[Tensor, "row time"] | None = None,
) -> tuple[Tile, ...]:
    """The tiles of a batch. They hold every visible pair once, and no query is without its own key.

    `starts` is where that which each token may attend to begins; it never falls along a row.
    """
    queries = min(QUERIES, time)
    rows = max(1, TILE_SCORES // (heads * queries * max(queries, time // 2)))
    begins = None if starts is None else starts[:, ::QUERIES].tolist()
    tiles = []
    past: dict[int, Tensor] = {}
    for first_row in range(0, row, rows):
        last_row = min(first_row + rows, row)
        for index, first in enumerate(range(0, time, QUERIES)):
            end = min(first + QUERIES, time)
            begin = 0 if begins is None else min(begins[place][index] for place in range(first_row, last_row))
            if segments is None:
                bias = past.get(first)
                if bias is None:
                    bias = past[first] = _bias(torch.arange(first, end)[:, None] >= torch.arange(end))[None]
            else:
                part = segments[first_row:last_row]
                seen = part[:, first:end, None] == part[:, None, begin:end]
                if prefixes is not None:
                    seen |= prefixes[first_row:last_row, first:end, None] == part[:, None, begin:end]
                bias = _bias(seen & (torch.arange(first, end)[:, None] >= torch.arange(begin, end)))
            place = slice(first_row, last_row), slice(first, end), slice(begin, end)
            tiles.append(Tile(*place, bias[:, None, None]))
    return tuple(tiles)


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def attend_in_tiles(
    qkv: Float[Tensor, "row time kv_head slot size"],
    rotations: Complex[Tensor, "row time 1 1 pair"],
    tiles: tuple[Tile, ...],
) -> Float[Tensor, "row time features"]:
    """Rotary attention; the slots of a key/value head are its query heads, its key, its value."""
    seen: Tensor = _TiledAttention.apply(qkv, rotations, tiles)
    return seen.flatten(2)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotations: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
        row, time, kv_heads, slots, size = qkv.shape
        with torch.autocast("cpu", enabled=False):
            turned = qkv.new_empty(row, kv_heads, slots - 1, time, size)
            _turn(qkv[:, :, :, :-1].permute(0, 2, 3, 1, 4), rotations.permute(0, 2, 3, 1, 4), turned)
            query, key, value = turned[:, :, :-1], turned[:, :, -1], qkv[:, :, :, -1].transpose(1, 2).contiguous()
            out = qkv.new_empty(row, time, kv_heads, slots - 2, size)
            scores = sum(tile.bias.shape[-1] * tile.bias.shape[-2] * _length(tile.rows) for tile in tiles)
            keep = ctx.needs_input_grad[0] and scores * kv_heads * (slots - 2) <= KEPT_SCORES
            kept = []
            for tile in tiles:
                probabilities = _probabilities(tile, query, key)
                seen = torch.bmm(probabilities, _of(value, tile.rows, tile.keys))
                out[tile.rows, tile.queries] = _unfold(seen, tile, kv_heads).permute(0, 3, 1, 2, 4)
                if keep:
                    kept.append(probabilities)
        ctx.save_for_backward(turned, value, rotations, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        turned, value, rotations, *kept = ctx.saved_tensors
        row, kv_heads, slots, time, size = turned.shape
        query, key = turned[:, :, :-1], turned[:, :, -1]
        outer = gradients[0].to(turned.dtype).permute(0, 2, 3, 1, 4)
        by_turned = torch.zeros_like(turned)
        by_value = torch.zeros_like(value)
        by_key = torch.zeros_like(value)
        for index, tile in enumerate(ctx.tiles):
            probabilities = kept[index] if kept else _probabilities(tile, query, key)
            gradient = outer[tile.rows, :, :, tile.queries].reshape(*probabilities.shape[:2], size)
            by_probability = torch.bmm(gradient, _of(value, tile.rows, tile.keys).transpose(1, 2))
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, probabilities.dtype)
            by_query = torch.bmm(by_score, _of(key, tile.rows, tile.keys))
            by_turned[tile.rows, :, :-1, tile.queries] = _unfold(by_query, tile, kv_heads)
            # not baddbmm_, which falls back to one product at a time where its target is a part of a tensor
            _of(by_value, tile.rows, tile.keys).add_(torch.bmm(probabilities.transpose(1, 2), gradient))
            _of(by_key, tile.rows, tile.keys).add_(torch.bmm(by_score.transpose(1, 2), _folded(tile, query)))
        by_turned[:, :, -1] = by_key
        by_turned[:, :, :-1].mul_(size**-0.5)
        by_qkv = value.new_empty(row, time, kv_heads, slots + 1, size)
        by_qkv[:, :, :, -1] = by_value.transpose(1, 2)
        _turn(by_turned.permute(0, 3, 1, 2, 4), rotations.conj().resolve_conj(), by_qkv[:, :, :, :-1])
        return by_qkv, None, None


def _turn(heads: Tensor, rotations: Tensor, out: Tensor) -> None:
    """Write the rotated feature pairs of `heads` into `out`, of the same shape in any layout."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    if out.dtype == torch.float32:
        torch.mul(pairs, rotations, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(pairs * rotations).flatten(-2))


def _probabilities(tile: Tile, query: Tensor, key: Tensor) -> Tensor:
    """[rows x kv_head, group x query, key]"""
    scores = torch.bmm(_folded(tile, query), _of(key, tile.rows, tile.keys).transpose(1, 2))
    _unfold(scores, tile, query.shape[1]).add_(tile.bias)
    return torch.softmax(scores, dim=-1)


def _folded(tile: Tile, query: Tensor) -> Tensor:
    """The tile's queries divided by sqrt(size), the heads of a group one below the other."""
    part = query[tile.rows, :, :, tile.queries] * query.shape[-1] ** -0.5
    folded: Tensor = part.flatten(0, 1).flatten(1, 2)
    return folded


def _unfold(folded: Tensor, tile: Tile, kv_heads: int) -> Tensor:
    """[rows kv_head group query ...] of what has the heads of a group one below the other."""
    unfolded: Tensor = folded.unflatten(0, (-1, kv_heads)).unflatten(2, (-1, _length(tile.queries)))
    return unfolded


def _of(whole: Tensor, rows: slice, keys: slice) -> Tensor:
    """A view of some keys or values: [rows x kv_head, key, size]."""
    part: Tensor = whole[rows, :, keys].flatten(0, 1)
    return part


def _length(part: slice) -> int:
    return int(part.stop - part.start)
