"""The same hybrid search where the database lies elsewhere and searches by itself: on a server of LanceDB, or in object
storage, where many machines read it.

    db://name                 LanceDB Cloud; LANCEDB_API_KEY and LANCEDB_REGION are read from the environment
    db://name                 LanceDB Enterprise, a cluster of one's own: its address in LANCEDB_HOST_OVERRIDE
    s3://bucket/path, ...     the files alone, with the keys that the environment names; this machine searches them

"#table" behind it names the table; without it the table is "documents". The words of a text stand in a column of their
own, so that the engine's BM25 sees the words that curate/postings.py does. Vectors are found exactly up to INDEXED_FROM
documents and through an approximate index from there on. Lists are joined and hits told as in curate/retrieval.py, the
cosines computed here from the vectors that are found.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as arrow
from jaxtyping import Float32, Float64

from upweight.core.errors import UserError
from upweight.curate.embed import Embedder, words_of_text
from upweight.curate.postings import Ranked
from upweight.curate.retrieval import TABLE, Embedded, Hit, Seed, joined

INDEXED_FROM = 100_000
"""Fewer vectors are compared one by one, which finds all that are near."""
REQUESTS_AT_ONCE = 16
BATCHES_AT_ONCE = 20
"""Go into one request, which is one version of the table."""
INDEX_HOURS = 24
"""How long the engine may take over an index."""


class ServedDatabase:
    """Documents with their vectors in a table of a LanceDB database, searchable by words and by vectors.

    Args:
        uri: of the database, "db://name#table".

    Raises UserError where it cannot be reached.
    """

    def __init__(self, uri: str, embedder: Embedder) -> None:
        # Takes three seconds to import, and most commands of the package never search.
        import lancedb

        self.uri, _, name = uri.partition("#")
        self._name = name or TABLE
        self._embedder = embedder
        with self._explained():
            options: dict[str, Any] = {}
            if self._on_server:
                host, region = os.environ.get("LANCEDB_HOST_OVERRIDE"), os.environ.get("LANCEDB_REGION")
                options = {"host_override": host} | ({"region": region} if region else {})
            self._connection: Any = lancedb.connect(self.uri, **options)
            self._table: Any = self._connection.open_table(self._name) if self._name in self._tables() else None

    def __len__(self) -> int:
        with self._explained():
            return int(self._table.count_rows()) if self._table is not None else 0

    @property
    def _on_server(self) -> bool:
        return self.uri.startswith("db://")

    @property
    def exists(self) -> bool:
        """Whether there is a table of that name."""
        return self._table is not None

    def drop(self) -> None:
        """Remove the table, if there is one."""
        with self._explained():
            if self._table is not None:
                self._connection.drop_table(self._name)
        self._table = None

    def add(self, batches: Iterable[Embedded]) -> None:
        """Store documents with their vectors, a batch at a time, and index them. Ids are taken to be unique."""
        schema = arrow.schema(
            [
                ("row", arrow.int64()),
                ("id", arrow.string()),
                ("source", arrow.string()),
                ("text", arrow.string()),
                ("words", arrow.string()),
                ("vector", arrow.list_(arrow.float32(), self._embedder.width)),
            ]
        )
        rows = self._rows(len(self), batches, schema)
        with self._explained():
            while chunk := list(islice(rows, BATCHES_AT_ONCE)):
                table = arrow.Table.from_batches(chunk, schema)
                if self._table is None:
                    self._table = self._connection.create_table(self._name, data=table)
                else:
                    self._table.add(table)
            if self._table is not None:
                self._index()

    def search(self, seeds: Sequence[Seed], *, hits: int, where: str | None = None) -> list[list[Hit]]:
        """For each seed its best `hits` documents, best first, ties by id.

        Args:
            seeds: what to search for. A seed without key words is searched for by its vector alone.
            hits: how many documents a seed hits at most.
            where: a condition in SQL on the columns id and source, "source = 'textbook'".
        """
        if not seeds:
            return []
        vectors = self._embedder.embed([seed.text for seed in seeds])

        def found(place: int) -> list[Hit]:
            return self._search(seeds[place], vectors[place], hits, where)

        with self._explained(), ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(found, range(len(seeds))))

    def _search(self, seed: Seed, vector: Float32[np.ndarray, " width"], hits: int, where: str | None) -> list[Hit]:
        depth = 2 * hits + 1  # as in retrieval.py
        near = self._table.search(vector, vector_column_name="vector", query_type="vector").distance_type("dot")
        found = [self._answer(near, depth, where, None)]
        if seed.key_words:
            asked = " ".join(dict.fromkeys(word.lower() for word in seed.key_words))
            worded = self._table.search(asked, query_type="fts", fts_columns="words")
            found.append(self._answer(worded, depth, where, "_score"))
        names: dict[int, str] = {}
        by_vector, *by_words = [
            _ranked(answer, score, vector, names) for answer, score in zip(found, (None, "_score"), strict=False)
        ]
        products = [_ranked(answer, None, vector, {}) for answer in found]
        words = by_words[0] if by_words else Ranked(np.zeros(0, np.int64), np.zeros(0))
        return joined(by_vector, words, products, depth=depth, hits=hits, name_of=names.__getitem__)

    @staticmethod
    def _answer(query: Any, depth: int, where: str | None, score: str | None) -> Any:
        limited = query.limit(depth).select(["row", "id", "vector", score or "_distance"])
        return (limited.where(where, prefilter=True) if where else limited).to_arrow()

    def _tables(self) -> Iterator[str]:
        token = None
        while True:
            page = self._connection.list_tables(page_token=token)
            yield from page.tables
            token = page.page_token
            if not token:
                return

    def _index(self) -> None:
        from lancedb.index import FTS, HnswSq

        configs: dict[str, Any] = {
            "words": FTS(
                base_tokenizer="whitespace", stem=False, remove_stop_words=False, ascii_folding=False, lower_case=False
            )
        }
        if len(self) >= INDEXED_FROM:
            configs["vector"] = HnswSq(distance_type="dot")
        there = {index.name for index in self._table.list_indices()}
        for column, config in configs.items():
            if f"{column}_idx" not in there:
                self._table.create_index(column, config=config)
        if there and not self._on_server:  # which does it by itself
            self._table.optimize()  # takes up what was added since
        for column in configs:
            self._await(f"{column}_idx")

    def _await(self, index: str) -> None:
        """A server makes its indexes behind one's back."""
        begun = time.monotonic()
        while (figures := self._table.index_stats(index)) is None or figures.num_unindexed_rows:
            waited = time.monotonic() - begun
            if waited > INDEX_HOURS * 3600:
                raise UserError(f"{self.uri} has not completed {index} of {self._name} in {INDEX_HOURS} hours")
            time.sleep(min(10.0, 0.1 + waited / 10))

    def _rows(self, first: int, batches: Iterable[Embedded], schema: Any) -> Iterator[Any]:
        for batch in batches:
            documents = batch.documents
            if documents:
                words = [" ".join(words_of_text(document.text)) for document in documents]
                columns = [
                    arrow.array(range(first, first + len(documents)), arrow.int64()),
                    arrow.array([document.id for document in documents], arrow.string()),
                    arrow.array([document.source for document in documents], arrow.string()),
                    arrow.array([document.text for document in documents], arrow.string()),
                    arrow.array(words, arrow.string()),
                    arrow.FixedSizeListArray.from_arrays(arrow.array(batch.vectors.reshape(-1)), self._embedder.width),
                ]
                yield arrow.RecordBatch.from_arrays(columns, schema=schema)
                first += len(documents)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client raises, with what to do."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"the database {self.uri} does not answer as it should ({error}): see that its address is right, "
                "that it is up, and that the keys of the object storage are set, or for db:// LANCEDB_API_KEY (and "
                "LANCEDB_HOST_OVERRIDE where the server is your own)"
            ) from error


def _ranked(answer: Any, score: str | None, vector: Float32[np.ndarray, " width"], names: dict[int, str]) -> Ranked:
    """The rows of an answer in their order, with a column as their scores, or with their products with a vector."""
    answer = answer.combine_chunks()
    rows = np.asarray(answer["row"], np.int64)
    order = np.argsort(rows, kind="stable")
    names.update(zip(rows.tolist(), answer["id"].to_pylist(), strict=True))
    if score is None:
        scores = np.asarray(answer["vector"].combine_chunks().flatten(), np.float32).reshape(len(rows), -1) @ vector
    else:
        scores = np.asarray(answer[score])
    kept: Float64[np.ndarray, " document"] = scores.astype(np.float64)[order]
    return Ranked(rows[order], kept)
