"""The keys and values of what was read so far, so that a decoding step reads one token a row.

All memory is taken once. Rows hold sequences of their own length, as a sampler with continuous batching needs: a row is
refilled by setting its length to 0, several rows share a prompt by `copy`, and a step over the first n rows touches no
more than these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Make the rows `targets` hold what the row `source` holds: a prompt read once, completed several times."""
        length = self.lengths[source]
        index = torch.tensor([target for target in targets if target != source], device=self.keys[0].device)
        if not len(index):
            return
        for store in (*self.keys, *self.values):
            store[index, :, :length] = store[source, :, :length]
        for target in index.tolist():
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
        if window.valid is None:
            held_keys[window.row_index, :, window.slots] = keys[:, :, 0].to(held_keys.dtype)
            held_values[window.row_index, :, window.slots] = values[:, :, 0].to(held_values.dtype)
        else:
            held_keys[window.row_index, :, window.slots] = keys.transpose(1, 2)[window.valid].to(held_keys.dtype)
            held_values[window.row_index, :, window.slots] = values.transpose(1, 2)[window.valid].to(held_values.dtype)
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
        self.rows: slice | Tensor = slice(0, count) if rows is None else torch.tensor(chosen, device=device)
        starts = torch.tensor(start, device=device)
        self.positions = starts[:, None] + torch.arange(new, device=device)
        row_ids = torch.tensor(list(chosen), device=device)
        if new == 1 and counts is None:
            self.row_index, self.slots = row_ids, starts
            self.valid = None
        else:
            self.valid = torch.arange(new, device=device) < torch.tensor(added, device=device)[:, None]
            self.row_index = row_ids[:, None].expand(-1, new)[self.valid]
            self.slots = self.positions[self.valid]
        slots = torch.arange(self.longest, device=device)
        self.visible = slots <= self.positions[:, :, None]
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
        capacity: of the cache. A row that is full does not count, and its last place is written over.
    """

    valid = None

    def __init__(self, lengths: Tensor, longest: int, capacity: int) -> None:
        self.longest = longest
        self.rows = slice(0, len(lengths))
        self.row_index = torch.arange(len(lengths), device=lengths.device)
        self.slots = lengths.clamp(max=capacity - 1)
        self.positions = self.slots[:, None]
        self.visible = torch.arange(longest, device=lengths.device) <= self.positions[:, :, None]
