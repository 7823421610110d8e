"""Which documents are close to a set of seeds: hybrid search, words and vectors, in an embedded database on disk.

Each seed asks twice: its rarest words by BM25 (curate/postings.py), its vector among the vectors (curate/nearest.py).
The two lists are joined by reciprocal-rank fusion (Cormack et al. 2009),
    fused(d) = sum over the lists that hold d of 1 / (60 + rank of d in the list),
and the best `hits` documents are hit. Fusion decides who is hit, the cosine how close: ranks do not compare over seeds.
    similarity(d) = the largest cosine of d with a seed that hit it, 0-1; 0 where none did.

Seeds are searched for together, some hundred at once: their words in one look at the index, their vectors in one pass
over the table. Both are exact. Documents that tie at the end of a list are left out of it together: which of them would
be in it depends on nothing that matters.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
from jaxtyping import Bool, Float32, Float64, Int64

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate.embed import Embedder, words_of_text
from upweight.curate.nearest import VECTORS_AT_ONCE, Nearest
from upweight.curate.postings import Postings, Ranked

RANK_OFFSET = 60
TABLE = "documents"
WORDS = "words"
SEEDS_AT_ONCE = 2_048
"""A pass over the vectors serves so many: reading them costs as much as the products with a few hundred seeds."""
SEEDS_OF_WORDS = 256
"""So many are looked up together in the index of words: all postings of their words are in memory meanwhile."""
KEY_WORDS = 12


class Hit(NamedTuple):
    """One document that a seed found."""

    document_id: str
    fused: float
    cosine: float


class Embedded(NamedTuple):
    """Some documents and their vectors."""

    documents: Sequence[Document]
    vectors: Float32[np.ndarray, "document width"]

    @classmethod
    def by(cls, embedder: Embedder, documents: Sequence[Document]) -> "Embedded":
        """The documents with the vectors that `embedder` gives them."""
        return cls(documents, embedder.embed([document.text for document in documents]))


@dataclass(frozen=True, slots=True)
class Seed:
    """A query: a text of the kind that is wanted, and the words that tell it apart."""

    text: str
    key_words: tuple[str, ...] = ()


class Database:
    """Documents with their vectors, searchable by words and by vectors, on disk below one directory.

    In memory are the ids, and of the vectors some thousand at a time.
    """

    def __init__(self, directory: Path, embedder: Embedder) -> None:
        # Takes three seconds to import, and most commands of the package never search.
        import lancedb

        self._connection: Any = lancedb.connect(str(directory))
        self._embedder = embedder
        existing = TABLE in self._connection.list_tables().tables
        self._table: Any = self._connection.open_table(TABLE) if existing else None
        self._postings = Postings(directory / WORDS)
        self._known_ids: Any = None
        if len(self) != len(self._postings):
            raise UserError(
                f"{directory} holds {len(self):,} documents and the words of {len(self._postings):,}: it was stopped "
                "while documents were added. Remove the directory and build it again"
            )

    def __len__(self) -> int:
        return int(self._table.count_rows()) if self._table is not None else 0

    def add(self, batches: Iterable[Embedded]) -> None:
        """Store documents with their vectors, a batch at a time. Ids are taken to be unique."""
        schema = arrow.schema(
            [
                ("row", arrow.int64()),
                ("id", arrow.string()),
                ("source", arrow.string()),
                ("text", arrow.string()),
                ("vector", arrow.list_(arrow.float32(), self._embedder.width)),
            ]
        )
        rows = (self._rows(batch, schema) for batch in batches if batch.documents)
        if self._table is None:
            self._table = self._connection.create_table(TABLE, data=rows, schema=schema)
        else:
            for batch in rows:
                self._table.add(batch)
        self._postings.flush()
        self._known_ids = None

    def search(self, seeds: Sequence[Seed], *, hits: int, where: str | None = None) -> list[list[Hit]]:
        """For each seed its best `hits` documents, best first, ties by id.

        Args:
            seeds: what to search for. A seed without key words is searched for by its vector alone.
            hits: how many documents a seed hits at most.
            where: a condition in SQL on the columns id and source, "source = 'textbook'".
        """
        allowed = self._allowed(where) if where else None
        found: list[list[Hit]] = []
        for start in range(0, len(seeds), SEEDS_AT_ONCE):
            found += self._search(seeds[start : start + SEEDS_AT_ONCE], hits, allowed)
        return found

    def _search(
        self, seeds: Sequence[Seed], hits: int, allowed: Bool[np.ndarray, " document"] | None
    ) -> list[list[Hit]]:
        depth = 2 * hits + 1  # a document low in one list may be high in the other
        asked = [[word.lower() for word in seed.key_words] for seed in seeds]
        by_words = [
            without_cut_ties(found, depth)
            for start in range(0, len(seeds), SEEDS_OF_WORDS)
            for found in self._postings.search(asked[start : start + SEEDS_OF_WORDS], allowed)
        ]
        nearest = Nearest(
            self._embedder.embed([seed.text for seed in seeds]), depth, [found.rows for found in by_words]
        )
        for first, vectors in self._vectors():
            nearest.see(first, vectors, None if allowed is None else allowed[first : first + len(vectors)])
        ids = self._ids()
        return [
            joined(
                vectors,
                words,
                [vectors, Ranked(words.rows, products)],
                depth=depth,
                hits=hits,
                name_of=lambda row: str(ids[row].as_py()),
            )
            for words, vectors, products in zip(by_words, nearest.best(), nearest.products(), strict=True)
        ]

    def _allowed(self, where: str) -> Bool[np.ndarray, " document"]:
        allowed = np.zeros(len(self), bool)
        for batch in self._table.search().where(where).select(["row"]).to_batches():
            allowed[np.asarray(batch.column("row"))] = True
        return allowed

    def _vectors(self) -> Iterator[tuple[int, Float32[np.ndarray, "document width"]]]:
        """All vectors, some thousand at a time: the row of the first, and they."""
        for batch in self._table.search().select(["row", "vector"]).to_batches(VECTORS_AT_ONCE):
            rows = np.asarray(batch.column("row"))
            vectors = np.asarray(batch.column("vector").flatten(), np.float32).reshape(len(rows), -1)
            # what was added later may be read earlier
            bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
            for start, stop in pairwise(bounds):
                yield int(rows[start]), vectors[start:stop]

    def _ids(self) -> Any:
        """The id of each row."""
        if self._known_ids is None:
            table = self._table.search().select(["row", "id"]).to_arrow()
            self._known_ids = table.sort_by("row")["id"].combine_chunks()
        return self._known_ids

    def _rows(self, batch: Embedded, schema: Any) -> Any:
        first, documents = len(self._postings), batch.documents
        self._postings.add(words_of_text(document.text) for document in documents)
        return arrow.RecordBatch.from_arrays(
            [
                arrow.array(range(first, first + len(documents)), arrow.int64()),
                arrow.array([document.id for document in documents], arrow.string()),
                arrow.array([document.source for document in documents], arrow.string()),
                arrow.array([document.text for document in documents], arrow.string()),
                arrow.FixedSizeListArray.from_arrays(arrow.array(batch.vectors.reshape(-1)), self._embedder.width),
            ],
            schema=schema,
        )


def fusion(rankings: Sequence[Ranked]) -> Ranked:
    """Join several searches by reciprocal ranks: the rows of all of them, in order, with their fused scores.

    Documents that tie within a search share the best of their ranks, so their order there does not matter.
    """
    rows = np.concatenate([found.rows for found in rankings])
    shares = np.concatenate([1 / (RANK_OFFSET + _ranks(found.scores)) for found in rankings])
    joined, place = np.unique(rows, return_inverse=True)
    return Ranked(joined, np.bincount(place, shares, len(joined)))


def _ranks(scores: Float64[np.ndarray, " document"]) -> Int64[np.ndarray, " document"]:
    """One more than there are higher scores."""
    return np.asarray(1 + len(scores) - np.searchsorted(np.sort(scores), scores, side="right"), np.int64)


def joined(
    by_vector: Ranked,
    by_words: Ranked,
    products: Sequence[Ranked],
    *,
    depth: int,
    hits: int,
    name_of: Callable[[int], str],
) -> list[Hit]:
    """What one seed hits: the best few of both searches together, best first, ties by id.

    Args:
        by_vector, by_words: what was found, `depth` documents each where there are as many or more.
        products: of the rows with the seed's vector; those of all rows that were found are among them.
        name_of: the id of a row.
    """
    fused = fusion([without_cut_ties(by_vector, depth), without_cut_ties(by_words, depth)])
    if len(fused.rows) > hits:
        enough = fused.scores >= np.partition(fused.scores, len(fused.scores) - hits)[len(fused.scores) - hits]
        fused = Ranked(fused.rows[enough], fused.scores[enough])
    cosines = {row: cosine for found in products for row, cosine in zip(*map(np.ndarray.tolist, found), strict=True)}
    named = [
        Hit(name_of(row), score, min(1.0, max(0.0, cosines[row])))
        for row, score in zip(fused.rows.tolist(), fused.scores.tolist(), strict=True)
    ]
    return sorted(named, key=lambda hit: (-hit.fused, hit.document_id))[:hits]


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


def without_cut_ties(found: Ranked, depth: int) -> Ranked:
    """The best documents, fewer than `depth`; all of them where there are no more."""
    if len(found.rows) < depth:
        return found
    above = found.scores > np.partition(found.scores, len(found.scores) - depth)[len(found.scores) - depth]
    return Ranked(found.rows[above], found.scores[above])
