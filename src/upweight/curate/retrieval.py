"""Which documents are close to a set of seeds: hybrid search, words and vectors, in an embedded database on disk.

Each seed asks twice: its rarest words in the full-text index (BM25), its vector among the vectors. The two lists are
joined by reciprocal-rank fusion (Cormack et al. 2009),
    fused(d) = sum over the lists that hold d of 1 / (60 + rank of d in the list),
and the best `hits` documents are hit. Fusion decides who is hit, the cosine how close: ranks do not compare over seeds.
    similarity(d) = the largest cosine of d with a seed that hit it, 0-1; 0 where none did.

Documents that tie at the end of a list are left out of it together: which of them a database returns is chance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
from jaxtyping import Float32

from upweight.core.records import Document
from upweight.curate.embed import Embedder

RANK_OFFSET = 60
TABLE = "documents"
SEEDS_AT_ONCE = 64
KEY_WORDS = 12
APPROXIMATE_ABOVE = 200_000
"""Documents from which the vectors get an approximate index; below it the vector search is exact."""


class Hit(NamedTuple):
    """One document that a seed found."""

    document_id: str
    fused: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Seed:
    """A query: a text of the kind that is wanted, and the words that tell it apart."""

    text: str
    key_words: tuple[str, ...] = ()


class Database:
    """Documents with their vectors, searchable by words and by vectors, on disk below one directory."""

    def __init__(self, directory: Path, embedder: Embedder) -> None:
        # Takes three seconds to import, and most commands of the package never search.
        import lancedb

        self._connection: Any = lancedb.connect(str(directory))
        self._embedder = embedder
        existing = TABLE in self._connection.list_tables().tables
        self._table: Any = self._connection.open_table(TABLE) if existing else None

    def __len__(self) -> int:
        return int(self._table.count_rows()) if self._table is not None else 0

    def add(
        self,
        batches: Iterable[Sequence[Document]],
        embedded: Callable[[Float32[np.ndarray, "document width"]], None] | None = None,
    ) -> None:
        """Embed and store documents, a batch at a time; then call `index`. Ids are taken to be unique.

        Args:
            embedded: is handed the vectors of each batch.
        """
        schema = arrow.schema(
            [
                ("id", arrow.string()),
                ("source", arrow.string()),
                ("text", arrow.string()),
                ("vector", arrow.list_(arrow.float32(), self._embedder.width)),
            ]
        )
        rows = (self._rows(batch, schema, embedded) for batch in batches if batch)
        if self._table is None:
            self._table = self._connection.create_table(TABLE, data=rows, schema=schema)
        else:
            for batch in rows:
                self._table.add(batch)

    def index(self) -> None:
        """Build the full-text index, and the approximate vector index where there are enough documents for one."""
        from lancedb.index import FTS, HnswSq  # as slow to import as lancedb itself

        self._table.create_index("text", config=FTS(with_position=False), replace=True)
        if len(self) > APPROXIMATE_ABOVE:
            self._table.create_index("vector", config=HnswSq(distance_type="dot"), replace=True)

    def search(self, seeds: Sequence[Seed], *, hits: int, where: str | None = None) -> list[list[Hit]]:
        """For each seed its best `hits` documents, best first, ties by id.

        Args:
            seeds: what to search for. A seed without key words is searched for by its vector alone.
            hits: how many documents a seed hits at most.
            where: a condition in SQL on the columns id and source, "source = 'textbook'".
        """
        found: list[list[Hit]] = []
        for start in range(0, len(seeds), SEEDS_AT_ONCE):
            found += self._search(seeds[start : start + SEEDS_AT_ONCE], hits, where)
        return found

    def _search(self, seeds: Sequence[Seed], hits: int, where: str | None) -> list[list[Hit]]:
        depth = 2 * hits + 1  # a document low in one list may be high in the other
        vectors = self._embedder.embed([seed.text for seed in seeds])
        by_vector = self._by_vector(vectors, depth, where)
        rankings = [
            [_without_cut_ties(by_vector[number], depth), _without_cut_ties(self._by_words(seed, depth, where), depth)]
            for number, seed in enumerate(seeds)
        ]
        fused = [reciprocal_rank_fusion(ranking)[:hits] for ranking in rankings]
        missing = {name for number, best in enumerate(fused) for name, _ in best if name not in by_vector[number]}
        stored = self._vectors(sorted(missing))
        return [
            [
                Hit(name, score, min(1.0, max(0.0, known[name] if name in known else float(stored[name] @ vector))))
                for name, score in best
            ]
            for best, known, vector in zip(fused, by_vector, vectors, strict=True)
        ]

    def _by_vector(
        self, vectors: Float32[np.ndarray, "seed width"], depth: int, where: str | None
    ) -> list[dict[str, float]]:
        query = self._table.search(list(vectors), query_type="vector", vector_column_name="vector")
        query = query.distance_type("dot").select(["id", "_distance"]).limit(depth)
        table = (query.where(where, prefilter=True) if where else query).to_arrow()
        found: list[dict[str, float]] = [{} for _ in vectors]
        # A query of one vector comes back without the column that numbers the queries.
        numbers = table["query_index"].to_pylist() if "query_index" in table.schema.names else [0] * len(table)
        for number, name, distance in zip(
            numbers, table["id"].to_pylist(), table["_distance"].to_pylist(), strict=True
        ):
            found[number][name] = 1 - distance  # the database calls 1 - a.b the distance "dot"
        return found

    def _by_words(self, seed: Seed, depth: int, where: str | None) -> dict[str, float]:
        if not seed.key_words:
            return {}
        query = self._table.search(" ".join(seed.key_words), query_type="fts", fts_columns="text")
        query = query.select(["id", "_score"]).limit(depth)
        table = (query.where(where, prefilter=True) if where else query).to_arrow()
        return dict(zip(table["id"].to_pylist(), table["_score"].to_pylist(), strict=True))

    def _vectors(self, names: Sequence[str]) -> dict[str, Any]:
        """The vectors of documents that only the words found."""
        if not names:
            return {}
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
        table = self._table.search().where(f"id in ({quoted})").select(["id", "vector"]).limit(len(names)).to_arrow()
        vectors = np.asarray(table["vector"].combine_chunks().flatten(), np.float32).reshape(len(table), -1)
        return dict(zip(table["id"].to_pylist(), vectors, strict=True))

    def _rows(self, batch: Sequence[Document], schema: Any, embedded: Callable[[Any], None] | None) -> Any:
        vectors = self._embedder.embed([document.text for document in batch])
        if embedded is not None:
            embedded(vectors)
        return arrow.RecordBatch.from_arrays(
            [
                arrow.array([document.id for document in batch], arrow.string()),
                arrow.array([document.source for document in batch], arrow.string()),
                arrow.array([document.text for document in batch], arrow.string()),
                arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.reshape(-1)), self._embedder.width),
            ],
            schema=schema,
        )


def reciprocal_rank_fusion(rankings: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Join several searches, each a score by document: (document, fused score), best first, ties by document.

    Documents that tie within a search share the best of their ranks, so their order there does not matter.
    """
    fused: dict[str, float] = {}
    for scores in rankings:
        rank, last = 0, float("nan")
        for place, (name, score) in enumerate(sorted(scores.items(), key=lambda item: -item[1]), start=1):
            rank, last = (rank, last) if score == last else (place, score)
            fused[name] = fused.get(name, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(fused.items(), key=lambda item: (-item[1], item[0]))


def closest(found: Iterable[Iterable[Hit]]) -> dict[str, float]:
    """The similarity of each document that was hit: its largest cosine with a seed that hit it, 0-1."""
    similarity: dict[str, float] = {}
    for hit in (hit for hits in found for hit in hits):
        similarity[hit.document_id] = max(hit.cosine, similarity.get(hit.document_id, 0.0))
    return similarity


def brute_force(
    vectors: Float32[np.ndarray, "document width"], queries: Float32[np.ndarray, "seed width"], hits: int
) -> list[list[tuple[int, float]]]:
    """The exact answer of a vector search, (row, cosine) best first: what an index is compared with."""
    cosines = queries @ vectors.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :hits]
    return [[(int(row), float(cosines[seed, row])) for row in rows] for seed, rows in enumerate(order)]


def _without_cut_ties(scores: dict[str, float], depth: int) -> dict[str, float]:
    if len(scores) < depth:
        return scores
    lowest = min(scores.values())
    return {name: score for name, score in scores.items() if score > lowest}
