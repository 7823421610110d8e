"""Decoding steps on CUDA as graphs: what the host says once for a step's hundreds of kernels is replayed at once.

A step of one token a row is so little work for a GPU that launching its kernels takes several times as long as running
them. A CUDA graph records the launches; replaying it costs one. It needs shapes and addresses that stay, so

- tokens and lengths are read from tensors of fixed place, filled before each replay;
- rows are padded to a power of two, and the places attended to likewise. A padded row writes at the next free place of
  a row that is not decoded, which is never visible, and its result is dropped.

Graphs are recorded as they are needed, one for each pair of sizes: rows shrink and lengths grow, so that a call meets
about as many pairs as both have powers of two. All graphs of a cache share one pool of memory and die with it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.model.cache import Cache, StepWindow

if TYPE_CHECKING:
    from upweight.model.transformer import Transformer

SHORTEST = 128
"""Places attended to by the smallest graph."""


class StepGraphs:
    """The recorded steps of one model over one cache.

    Attributes:
        record: turns a step into what replays it. A test on a CPU puts the step itself in place of its graph.
    """

    def __init__(self, cache: Cache, record: "Callable[[Callable[[], Tensor]], Replay] | None" = None) -> None:
        device = cache.keys[0].device
        self.tokens = torch.zeros((cache.rows, 1), dtype=torch.long, device=device)
        self.lengths = torch.zeros(cache.rows, dtype=torch.long, device=device)
        self.record = record or _Recorder()
        self._replays: dict[tuple[int, int], Replay] = {}
        self._table: Tensor | None = None  # graphs read it where it lies, and the model would drop it for a longer one

    def step(self, model: "Transformer", tokens: Int[Tensor, "row 1"], cache: Cache) -> Float[Tensor, "row 1 width"]:
        """Read one more token into each of the first rows of the cache; their hidden states."""
        count = len(tokens)
        longest = max(cache.lengths[:count]) + 1
        if longest > cache.capacity:
            raise ValueError(f"a row would hold {longest} tokens, but the cache was made for {cache.capacity}")
        size = min(padded(count), cache.rows), min(max(padded(longest), SHORTEST), cache.capacity)
        self.tokens[:count].copy_(tokens)
        self.lengths.copy_(torch.tensor(cache.lengths))
        if size not in self._replays:
            rows, places = size
            if self._table is None:
                self._table = model.rotation_table(cache.capacity)
            table = self._table

            def whole() -> Tensor:
                window = StepWindow(self.lengths[:rows], places, cache)
                return model.extend_by(self.tokens[:rows], window, table, cache)

            self._replays[size] = self.record(whole)
        hidden = self._replays[size]()[:count].clone()
        for row in range(count):
            cache.lengths[row] += 1
        return hidden


Replay = Callable[[], Tensor]


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


class _Recorder:
    """Records steps into graphs of one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            step()  # once by itself: what libraries set up at their first call cannot be recorded
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
