"""The tags of many documents as one table of small integers, asked by the names of the dimensions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from jaxtyping import Bool, Float64, UInt8

from upweight.core.errors import UserError
from upweight.core.records import DIMENSION_COUNT, HIGHEST_SCORE
from upweight.curate.dimensions import DIMENSIONS

AT_ONCE = 10_000
NAMES: tuple[str, ...] = tuple(dimension.name for dimension in DIMENSIONS)


@dataclass(frozen=True)
class Scores:
    """One row of 20 scores, 0-9 each, for each document."""

    table: UInt8[np.ndarray, "document dimension"]

    @classmethod
    def read(cls, path: Path, document_ids: Sequence[str]) -> "Scores":
        """The tags in `path` (columns document_id, scores) in the order of `document_ids`; each one must have some."""

        def flat(column: Any) -> UInt8[np.ndarray, "document dimension"]:
            values = np.asarray(column.flatten(), np.uint8)
            if len(values) != DIMENSION_COUNT * len(column):
                raise UserError(f"{path}: not every document has {DIMENSION_COUNT} scores. Run tag again")
            return values.reshape(-1, DIMENSION_COUNT)

        return cls(_in_order(path, "scores", document_ids, "tag", flat))

    def mean(self, weights: Mapping[str, float]) -> Float64[np.ndarray, " document"]:
        """The weighted mean of the named dimensions' scores as a share of the highest one, 0-1."""
        if not weights or any(weight < 0 for weight in weights.values()) or not sum(weights.values()):
            raise UserError(f"weights {dict(weights)}: expected dimensions with weights of 0 or more, not all 0")
        columns = [dimension_index(name) for name in weights]
        values = np.fromiter(weights.values(), np.float64)
        # einsum and not matmul: the sum of a row then does not depend on how many rows there are.
        summed = np.einsum("nd,d->n", self.table[:, columns].astype(np.float64), values)
        return np.asarray(summed / (HIGHEST_SCORE * values.sum()))

    def reach(self, floors: Mapping[str, int]) -> Bool[np.ndarray, " document"]:
        """Which documents reach every floor; all of them where there is none."""
        reached = np.ones(len(self.table), bool)
        for name, floor in floors.items():
            reached &= self.table[:, dimension_index(name)] >= floor
        return reached

    def missed(self, row: int, floors: Mapping[str, int]) -> str:
        """The first floor that a document misses, "factual_reliability below 4"; empty where it misses none."""
        for name, floor in floors.items():
            if self.table[row, dimension_index(name)] < floor:
                return f"{name} below {floor}"
        return ""


def dimension_index(name: str) -> int:
    """The place of a dimension by its name."""
    if name not in NAMES:
        raise UserError(f"{name!r} is no quality dimension: expected one of {', '.join(NAMES)}")
    return NAMES.index(name)


def read_similarity(path: Path, document_ids: Sequence[str]) -> Float64[np.ndarray, " document"]:
    """The similarities in `path` (columns document_id, similarity) in the order of `document_ids`."""
    found = _in_order(path, "similarity", document_ids, "retrieve", lambda column: np.asarray(column, np.float64))
    return np.asarray(found)


def read_clusters(path: Path, document_ids: Sequence[str]) -> list[int]:
    """The clusters in `path` (columns document_id, cluster) in the order of `document_ids`."""
    if path.exists() and "cluster" not in parquet.read_schema(path).names:
        raise UserError(f"{path} has no clusters, and a tier bounds their shares: set clusters of retrieve, say 256")
    return _in_order(path, "cluster", document_ids, "retrieve", np.asarray).tolist()  # type: ignore[no-any-return]


def _in_order(path: Path, name: str, wanted: Sequence[str], stage: str, values: Callable[[Any], Any]) -> Any:
    """A column of a table, one entry for each wanted document; UserError where the table lacks one.

    Args:
        values: makes an array of a piece of the column.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: is the step's input the right artifact?")
    file = parquet.ParquetFile(path)
    parts = [values(batch.column(name)) for batch in file.iter_batches(AT_ONCE, columns=[name])]
    found = np.concatenate([*parts] or [np.zeros(0)])
    if _are_ids(file, wanted):  # as a rule they are, and then there is nothing to look up, and to hold
        return found
    names = parquet.read_table(path, columns=["document_id"])["document_id"].to_pylist()
    places = {one: row for row, one in enumerate(names)}
    try:
        return found[[places[one] for one in wanted]]
    except KeyError as error:
        raise UserError(f"{path} lacks document {error.args[0]}: run {stage} on the same documents again") from None


def _are_ids(file: parquet.ParquetFile, wanted: Sequence[str]) -> bool:
    start = 0
    for batch in file.iter_batches(AT_ONCE, columns=["document_id"]):
        if batch.column(0).to_pylist() != list(wanted[start : start + len(batch)]):
            return False
        start += len(batch)
    return start == len(wanted)
