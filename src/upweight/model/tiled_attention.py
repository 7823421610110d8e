"""Attention on a CPU: plain matrix products over tiles of the score matrix, gradient by hand.

    s = q k^T / sqrt(size) + bias,  p = softmax(s),  y = p v
    dv = p^T dy,  dp = dy v^T,  ds = p (dp - sum(p dp)),  dq = ds k / sqrt(size),  dk = ds^T q / sqrt(size)

A tile is some rows of the batch, `QUERIES` queries and the keys that any of them can see: from the beginning of the
first query's sequence to the last query, and those of a prompt that this sequence shares with others, which may stand
far before it. What the future and other sequences of the row hold is mostly never computed.
Query heads that share a key fold into the rows of one product, without a copy: queries lie by time, then by head. A
tile's scores stay in the processor's cache, which is where most of the speed comes from: untiled, the same products
take about three times as long, and torch's own attention 1.3 to 1.6 times (docs/log).

Up to `KEPT_SCORES` the probabilities are kept for the gradient, beyond they are computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from upweight.model.context import Part
from upweight.model.precision import wide_dtype, widened

QUERIES = 64
"""Queries of a tile."""

TILE_SCORES = 1 << 18
"""About how many scores a tile holds: 1 MB in fp32."""

SHORT_TILE_SCORES = 1 << 20
"""The same in bf16, whose products cost more to begin."""

KEPT_SCORES = 1 << 26
"""Scores of one layer up to which probabilities are kept for the gradient: 256 MB in fp32."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of the score matrix: rows of the batch, queries, keys.

    Attributes:
        bias: what is added to the scores of the last keys of the tile (0 or -inf); all see the keys before them.
        shared: keys that come before `keys`: a shared prompt, where other sequences stand between it and the queries'.
    """

    rows: slice
    queries: slice
    keys: slice
    bias: Float[Tensor, "rows 1 query 1 last"]
    shared: slice

    @property
    def scores(self) -> int:
        """Of each head."""
        keys = _length(self.keys) + _length(self.shared)
        return _length(self.rows) * _length(self.queries) * keys


def tiles_of(
    row: int,
    time: int,
    heads: int,
    segments: Int[Tensor, "row time"] | None,
    starts: Int[Tensor, "row time"] | None,
    prefixes: Int[Tensor, "row time"] | None = None,
    dtype: torch.dtype = torch.float32,
    spans: Sequence[range] | None = None,
) -> tuple[Tile, ...]:
    """The tiles of a batch. They hold every visible pair once, and no query is without its own key.

    `starts` is where that which each token may attend to begins; it never falls along a row. `dtype` is that of the
    products, which decides how large a tile is best. `spans` are the places whose queries are held, side by side; None
    holds those of all. Keys are always held of all places.
    """
    held = [range(time)] if spans is None else spans
    offset, tiles = 0, list[Tile]()
    for span in held:
        tiles += _tiles_of_span(span, offset, row, time, heads, segments, starts, prefixes, dtype)
        offset += len(span)
    return tuple(tiles)


def _tiles_of_span(
    span: range,
    offset: int,
    row: int,
    time: int,
    heads: int,
    segments: Tensor | None,
    starts: Tensor | None,
    prefixes: Tensor | None,
    dtype: torch.dtype,
) -> list[Tile]:
    """The tiles of the queries at the places of `span`, which lie from `offset` on among those that are held."""
    queries = min(QUERIES, len(span))
    most = TILE_SCORES if dtype == torch.float32 else SHORT_TILE_SCORES
    rows = max(1, most // (heads * queries * max(queries, time // 2)))
    within = None if starts is None else starts[:, span.start : span.stop]
    begins = None if within is None else within[:, ::QUERIES].tolist()
    # two segments that continue a third begin with it, so they would pass for one
    ends = [] if within is None or prefixes is not None else within[:, QUERIES - 1 :: QUERIES].tolist()
    tiles = []
    past: dict[int, Tensor] = {}
    for first_row in range(0, row, rows):
        last_row = min(first_row + rows, row)
        place = range(first_row, last_row)
        for index, first in enumerate(range(span.start, span.stop, QUERIES)):
            end = min(first + QUERIES, span.stop)
            begin = 0 if begins is None else min(begins[at][index] for at in place)
            shared = slice(0, 0)
            if begins is None or (ends and all(_one_sequence(begins[at], ends[at], index, begin) for at in place)):
                bias = past.get(end - first)
                if bias is None:
                    causal = torch.ones(end - first, end - first, dtype=torch.bool).tril()
                    bias = past[end - first] = _bias(causal[None])
            else:
                assert segments is not None
                part, places = segments[first_row:last_row], torch.arange(begin, end)
                if prefixes is not None and len(place) == 1:
                    shared, begin = _apart(part[0], begin, first)
                    places = torch.cat((torch.arange(shared.start, shared.stop), torch.arange(begin, end)))
                seen = part[:, first:end, None] == part[:, None, places]
                if prefixes is not None:
                    seen |= prefixes[first_row:last_row, first:end, None] == part[:, None, places]
                bias = _bias(seen & (torch.arange(first, end)[:, None] >= places))
            place_held = first - span.start + offset
            parts = slice(first_row, last_row), slice(place_held, place_held + end - first), slice(begin, end)
            tiles.append(Tile(*parts, bias[:, None, :, None], shared))
    return tiles


def _one_sequence(begins: list[int], ends: list[int], index: int, begin: int) -> bool:
    """Whether all queries of a tile belong to the one sequence that begins with the tile's first key."""
    return index < len(ends) and begins[index] == begin == ends[index]


def _apart(segments: Tensor, begin: int, first: int) -> tuple[slice, int]:
    """The prompt at `begin` that the segment of the query at `first` continues, and where that segment itself begins.

    Between the two stand others that continue the same prompt. Later queries need no other prompt that stands before.
    """
    before = segments[begin : first + 1]
    own = begin + int((before == before[-1]).nonzero()[0, 0])
    prompt = int((before == before[0]).sum())
    if begin + prompt >= own:
        return slice(0, 0), begin
    return slice(begin, begin + prompt), own


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def attend_in_tiles(
    qkv: Float[Tensor, "row time kv_head slot size"],
    rotations: Complex[Tensor, "row time 1 1 pair"],
    tiles: tuple[Tile, ...],
    part: Part | None = None,
) -> Float[Tensor, "row time features"]:
    """Rotary attention; the slots of a key/value head are its query heads, its key, its value.

    With a `part` this process's places have the queries, and the keys and values of all are gathered.
    """
    query, key, value = _Turn.apply(qkv, rotations)
    return attend_turned(query, key, value, tiles, part)


def attend_turned(
    query: Float[Tensor, "row kv_head time group size"],
    key: Float[Tensor, "row kv_head time size"],
    value: Float[Tensor, "row kv_head time size"],
    tiles: tuple[Tile, ...],
    part: Part | None = None,
) -> Float[Tensor, "row time features"]:
    """The same of queries, divided by sqrt(size), and keys that are turned already."""
    if part is not None:
        key, value = part.whole(torch.stack((key, value)), axis=3)
    seen: Tensor = _TiledAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), tiles)
    return seen.flatten(2)


class _Turn(torch.autograd.Function):
    """Queries, keys and values apart, each in the order in which a tile reads them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, time, kv_heads, slots, size = qkv.shape
        ctx.save_for_backward(rotations)
        query = qkv.new_empty(row, kv_heads, time, slots - 2, size)
        key = qkv.new_empty(row, kv_heads, time, size)
        by_time = rotations.transpose(1, 2)
        _turn(qkv[:, :, :, :-2].transpose(1, 2), by_time * size**-0.5, query)
        _turn(qkv[:, :, :, -2].transpose(1, 2), by_time[:, :, :, 0], key)
        return query, key, qkv[:, :, :, -1].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        by_query, by_key, by_value = gradients
        row, kv_heads, time, group, size = by_query.shape
        back = ctx.saved_tensors[0].conj().resolve_conj()
        by_qkv = by_query.new_empty(row, time, kv_heads, group + 2, size)
        _turn(by_query.transpose(1, 2), back * size**-0.5, by_qkv[:, :, :, :-2])
        _turn(by_key.transpose(1, 2), back[:, :, :, 0], by_qkv[:, :, :, -2])
        by_qkv[:, :, :, -1] = by_value.transpose(1, 2)
        return by_qkv, None


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
        row, kv_heads, time, group, size = query.shape
        out = query.new_empty(row, time, kv_heads, group, size)
        scores = sum(tile.scores for tile in tiles)
        keep = any(ctx.needs_input_grad) and scores * kv_heads * group <= KEPT_SCORES
        kept = []
        with torch.autocast("cpu", enabled=False):
            for tile in tiles:
                probabilities = _probabilities(tile, query, key)
                seen = torch.bmm(probabilities, _of(value, tile))
                out[tile.rows, tile.queries] = _unfold(seen, query, tile).transpose(1, 2)
                if keep:
                    kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        outer = gradients[0].transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)
        by_query = torch.empty_like(query)
        by_value = torch.zeros_like(value, dtype=wide_dtype(value.dtype))
        by_key = torch.zeros_like(by_value)
        for index, tile in enumerate(ctx.tiles):
            probabilities = kept[index] if kept else _probabilities(tile, query, key)
            gradient = _folded(outer, tile)
            by_probability = torch.bmm(gradient, _across(value, tile))
            by_score = torch._softmax_backward_data(by_probability, probabilities, -1, probabilities.dtype)
            of_tile = torch.bmm(by_score, _of(key, tile))
            by_query[tile.rows, :, tile.queries] = _unfold(of_tile, query, tile)
            # not baddbmm_, which falls back to one product at a time where its target is a part of a tensor
            _add(by_value, tile, torch.bmm(probabilities.transpose(1, 2), gradient))
            _add(by_key, tile, torch.bmm(by_score.transpose(1, 2), _folded(query, tile)))
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None


def _turn(heads: Tensor, rotations: Tensor, out: Tensor) -> None:
    """Write the rotated feature pairs of `heads` into `out`, of the same shape in any layout."""
    pairs = torch.view_as_complex(widened(heads).unflatten(-1, (-1, 2)))
    if out.dtype == wide_dtype(heads.dtype):
        torch.mul(pairs, rotations, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(pairs * rotations).flatten(-2))


def _probabilities(tile: Tile, query: Tensor, key: Tensor) -> Tensor:
    """[rows x kv_head, query x group, key]"""
    scores = torch.bmm(_folded(query, tile), _across(key, tile))
    # a bias of another dtype would have the scores copied there and back
    _unfold(scores, query, tile)[..., -tile.bias.shape[-1] :].add_(tile.bias.to(scores.dtype))
    return torch.softmax(scores, dim=-1)


def _folded(whole: Tensor, tile: Tile) -> Tensor:
    """A view of the tile's queries, or of what else is laid out like them: [rows x kv_head, query x group, size]."""
    part: Tensor = whole[tile.rows, :, tile.queries].flatten(2, 3).flatten(0, 1)
    return part


def _unfold(folded: Tensor, query: Tensor, tile: Tile) -> Tensor:
    """[rows kv_head query group ...] of what is folded like the tile's queries."""
    unfolded: Tensor = folded.unflatten(0, (-1, query.shape[1])).unflatten(2, (_length(tile.queries), -1))
    return unfolded


def _of(whole: Tensor, tile: Tile) -> Tensor:
    """The tile's keys, or values: [rows x kv_head, key, size]; a view where no prompt stands apart."""
    own = _part(whole, tile.rows, tile.keys)
    return torch.cat((_part(whole, tile.rows, tile.shared), own), dim=1) if _length(tile.shared) else own


def _across(whole: Tensor, tile: Tile) -> Tensor:
    """`_of` with keys as columns: [rows x kv_head, size, key]."""
    part = _of(whole, tile)
    # the library that multiplies bfloat16 reads the transpose of one block of memory as it lies; of a part of a larger
    # one it makes a copy element by element
    return (part.contiguous() if part.dtype == torch.bfloat16 else part).transpose(1, 2)


def _add(total: Tensor, tile: Tile, gradient: Tensor) -> None:
    """Add what is laid out like `_of` to where it came from."""
    prompt = _length(tile.shared)
    if prompt:
        _part(total, tile.rows, tile.shared).add_(gradient[:, :prompt])
    _part(total, tile.rows, tile.keys).add_(gradient[:, prompt:])


def _part(whole: Tensor, rows: slice, keys: slice) -> Tensor:
    """A view of some keys or values: [rows x kv_head, key, size]."""
    part: Tensor = whole[rows, :, keys].flatten(0, 1)
    return part


def _length(part: slice) -> int:
    return int(part.stop - part.start)
