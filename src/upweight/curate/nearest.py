"""The nearest vectors to many queries, exactly, in one pass over vectors that need not fit into memory.

For B queries together, N vectors of width D are one matrix product of 2 B N D operations, at the speed of the machine's
products: 100,000 x 384 cost a millisecond of a core and query, and no index has to be built first. Building one for
approximate search costs as much as thousands of queries do, so it would pay for none of the stages.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from upweight.curate.postings import Ranked

VECTORS_AT_ONCE = 2_048


class Nearest:
    """The best few of all vectors seen so far, for each of several queries.

    Args:
        queries: one row a query.
        depth: how many are kept of each.
        wanted: rows of each query whose products are asked for whether they are among the best or not.
    """

    def __init__(
        self,
        queries: Float32[np.ndarray, "query width"],
        depth: int,
        wanted: Sequence[Int64[np.ndarray, " _"]],
    ) -> None:
        self._queries = torch.from_numpy(queries)
        self._depth = depth
        self._lowest = np.full(len(queries), -np.inf, np.float32)
        self._parts: list[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"], Float32[np.ndarray, " _"]]] = []
        self._pending = 0
        owners = np.repeat(np.arange(len(queries)), [len(rows) for rows in wanted])
        rows = np.concatenate([np.zeros(0, np.int64), *wanted])
        order = np.argsort(rows, kind="stable")
        self._owners, self._rows = owners[order], rows[order]
        self._products = np.zeros(len(rows), np.float32)
        self._wanted_order = order

    def see(
        self,
        first: int,
        vectors: Float32[np.ndarray, "vector width"],
        allowed: Bool[np.ndarray, " vector"] | None = None,
    ) -> None:
        """The vectors of rows `first` and following; those that are not allowed are not among the best."""
        for start in range(0, len(vectors), VECTORS_AT_ONCE):
            part = vectors[start : start + VECTORS_AT_ONCE]
            products = torch.mm(self._queries, torch.tensor(part).T).numpy()  # a copy: torch shares no read-only memory
            begin, end = np.searchsorted(self._rows, (first + start, first + start + len(part)))
            self._products[begin:end] = products[self._owners[begin:end], self._rows[begin:end] - (first + start)]
            if allowed is not None:
                products[:, ~allowed[start : start + VECTORS_AT_ONCE]] = -np.inf
            self._keep(first + start, products)

    def _keep(self, first: int, products: Float32[np.ndarray, "query vector"]) -> None:
        width = products.shape[1]
        if width >= self._depth:  # cheap the first time, when nothing is known of how near the best are
            unknown = np.flatnonzero(np.isneginf(self._lowest))
            if len(unknown):
                bounds = np.partition(products[unknown], width - self._depth, axis=1)[:, width - self._depth]
                self._lowest[unknown] = np.nextafter(bounds, np.float32(-np.inf))
        places = np.flatnonzero(products > self._lowest[:, None])
        if len(places):
            self._parts.append((places // width, first + places % width, products.ravel()[places]))
            self._pending += len(places)
        if self._pending > self._depth * len(self._lowest):
            self._settle()

    def _settle(self) -> None:
        """Leave of each query its best, and what is to be beaten."""
        query, row, product = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((row, -product, query))
        query, row, product = query[order], row[order], product[order]
        starts = np.searchsorted(query, np.arange(len(self._lowest)))
        place = np.arange(len(query)) - starts[query]
        best = place < self._depth
        last = place == self._depth - 1
        self._lowest[query[last]] = product[last]
        self._parts, self._pending = [(query[best], row[best], product[best])], 0

    def best(self) -> list[Ranked]:
        """For each query its best rows, best first, with their products; equal ones by row."""
        if not self._parts:
            return [Ranked(np.zeros(0, np.int64), np.zeros(0))] * len(self._lowest)
        self._settle()
        query, row, product = self._parts[0]
        bounds = np.searchsorted(query, np.arange(len(self._lowest) + 1))
        return [
            Ranked(row[begin:end], product[begin:end].astype(np.float64))
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]

    def products(self) -> list[Float64[np.ndarray, " _"]]:
        """For each query the products with its wanted rows, in the order in which they were given."""
        found = np.empty(len(self._products))
        found[self._wanted_order] = self._products
        owners = np.empty_like(self._owners)
        owners[self._wanted_order] = self._owners
        bounds = np.searchsorted(owners, np.arange(len(self._lowest) + 1))
        return [found[begin:end] for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
