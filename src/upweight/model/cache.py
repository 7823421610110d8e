"""The keys and values of what was read so far, so that a decoding step reads one token a row.

All memory is taken once. Rows hold sequences of their own length, as a sampler with continuous batching needs: a row is
refilled by setting its length to 0, several rows share a prompt by `copy`, and a step over the first n rows touches no
more than these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from upweight.model.config import ModelConfig

if TYPE_CHECKING:
    from upweight.model.step_graphs import StepGraphs


HOST_BYTES = 4 << 30
"""Memory that a cache may take on a device that does not say what is free."""


def cache_room(device: torch.device) -> int:
    """Bytes that keys and values may take: half of what is free on CUDA, whose other half is for the work itself."""
    if device.type != "cuda":
        return HOST_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + held) // 2


class Cache:
    """Keys and values of `rows` sequences of up to `capacity` tokens.

    Attributes:
        keys, values: one tensor a layer, [row kv_head capacity head_size].
        lengths: tokens held by each row, on the host: the sampler decides by them and must not wait for the device.
        graphs: on CUDA, the decoding steps recorded over this cache's memory; None before the first.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (rows, config.kv_heads, capacity, config.head_size)
        # zeros, because a masked place still enters a product with weight 0, and 0 times garbage can be NaN
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.lengths = [0] * rows
        self.graphs: "StepGraphs | None" = None
        self.rows = rows
        self.capacity = capacity

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each row of `targets` hold what the row of `sources` in its place holds: a prompt read once and
        completed several times, or rows that move. No target is named twice; a row may be both."""
        if not targets:
            return
        lengths = [self.lengths[row] for row in sources]
        longest, device = max(lengths), self.keys[0].device
        read, written = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for store in (*self.keys, *self.values):
            held = store[:, :, :longest]
            held.index_copy_(0, written, held.index_select(0, read))
        for target, length in zip(targets, lengths, strict=True):
            self.lengths[target] = length

    def clear(self, rows: Sequence[int]) -> None:
        """Empty these rows for other sequences."""
        for row in rows:
            self.lengths[row] = 0

    def crop(self, row: int, length: int) -> None:
        """Forget what a row holds past its first `length` tokens."""
        self.lengths[row] = min(self.lengths[row], length)

    def append(self, layer: int, keys: Tensor, values: Tensor, window: "Window | StepWindow") -> tuple[Tensor, Tensor]:
        """Write new keys and values [row kv_head time size] and return all that the window's rows now attend to."""
        held_keys, held_values = self.keys[layer], self.values[layer]
        for store, new in ((held_keys, keys), (held_values, values)):
            by_token = new.transpose(1, 2)
            fresh = by_token.flatten(0, 1) if window.valid is None else by_token[window.valid]
            # one index into flat memory is several times faster than a pair of them around an axis
            store.view(-1, store.shape[-1]).index_copy_(0, window.places, fresh.flatten(0, 1).to(store.dtype))
        return held_keys[window.rows, :, : window.longest], held_values[window.rows, :, : window.longest]


class Window:
    """Which rows of a cache one forward pass extends, by how many tokens, and what each new token may attend to.

    Made once a pass and shared by its layers. `rows` None stands for the first rows, the case without any gathering.
    """

    def __init__(
        self, cache: Cache, new: int, count: int, rows: Sequence[int] | None, counts: Sequence[int] | None
    ) -> None:
        device = cache.keys[0].device
        chosen = range(count) if rows is None else rows
        if len(chosen) != count or any(not 0 <= row < cache.rows for row in chosen):
            raise ValueError(f"{count} rows of tokens for the cache rows {list(chosen)} of {cache.rows}")
        added = [new] * count if counts is None else list(counts)
        if len(added) != count or any(not 0 <= amount <= new for amount in added):
            raise ValueError(f"counts {added} for {count} rows of {new} tokens: expected one each, 0 to {new}")
        start = [cache.lengths[row] for row in chosen]
        end = [first + amount for first, amount in zip(start, added, strict=True)]
        self.longest = max(end)
        if self.longest > cache.capacity:
            raise ValueError(f"a row would hold {self.longest} tokens, but the cache was made for {cache.capacity}")
        row_index = torch.arange(count, device=device) if rows is None else torch.tensor(chosen, device=device)
        self.rows: slice | Tensor = slice(0, count) if rows is None else row_index
        starts = torch.from_numpy(np.array(start, dtype=np.int64)).to(device)
        self.positions = starts[:, None] + torch.arange(new, device=device)
        row_index, slots = row_index[:, None].expand(-1, new), self.positions
        self.valid = None
        if counts is not None:
            self.valid = torch.arange(new, device=device) < torch.tensor(added, device=device)[:, None]
            row_index, slots = row_index[self.valid], slots[self.valid]
        self.places = _places(cache, row_index, slots)
        self.visible = torch.arange(self.longest, device=device) <= self.positions[:, :, None]
        self._cache, self._chosen, self._end = cache, chosen, end

    def commit(self) -> None:
        """The new tokens are held from now on."""
        for row, length in zip(self._chosen, self._end, strict=True):
            self._cache.lengths[row] = length


class StepWindow:
    """One more token for each of the first rows, with sizes that do not depend on the lengths: what a graph needs.

    Args:
        lengths: tokens held by each row, on the device.
        longest: places attended to; no row that counts holds as many before the step.
        cache: a row of it that is full does not count, and its last place is written over.
    """

    valid = None

    def __init__(self, lengths: Tensor, longest: int, cache: Cache) -> None:
        self.longest = longest
        self.rows = slice(0, len(lengths))
        self.positions = lengths.clamp(max=cache.capacity - 1)[:, None]
        self.places = _places(cache, torch.arange(len(lengths), device=lengths.device), self.positions)
        self.visible = torch.arange(longest, device=lengths.device) <= self.positions[:, :, None]


def _places(cache: Cache, rows: Tensor, slots: Tensor) -> Tensor:
    """Where a layer's memory, seen as a list of heads' vectors, has those of each token of these rows."""
    heads = cache.keys[0].shape[1]
    by_head = rows.reshape(-1, 1) * heads + torch.arange(heads, device=rows.device)
    return (by_head * cache.capacity + slots.reshape(-1, 1)).flatten()
