"""The documents of an artifact, `documents/*.parquet` with columns id, text and source, a batch at a time."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as arrow
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.records import Document

DOCUMENTS_AT_ONCE = 1_000
BYTES_AT_ONCE = 64_000_000
DOCUMENTS_OF_FILE = 50_000

_DOCUMENTS = arrow.schema([(name, arrow.string()) for name in ("id", "text", "source")])
_DROPPED = arrow.schema([(name, arrow.string()) for name in ("id", "source", "reason", "detail", "excerpt")])


@dataclass(frozen=True)
class Listing:
    """What is known of every document without its text, in the order in which the texts are read.

    Some 100 bytes a document: the names of the sources are there once, and many times told of.
    """

    ids: list[str]
    sources: list[str]
    byte_counts: "array[int]"


def document_files(artifact: Path) -> list[Path]:
    """The files of documents in an artifact, in their fixed order; UserError where there are none."""
    files = sorted((artifact / "documents").glob("*.parquet"))
    if not files:
        raise UserError(f"{artifact} holds no documents/*.parquet: is the step's input the right artifact?")
    return files


def listing(files: Sequence[Path]) -> Listing:
    """Ids, sources and UTF-8 lengths of all documents; the texts are read and forgotten batch by batch."""
    listed, names = Listing([], [], array("q")), dict[str, str]()
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(DOCUMENTS_AT_ONCE, columns=["id", "text", "source"]):
            listed.ids.extend(batch.column("id").to_pylist())
            listed.sources.extend(names.setdefault(name, name) for name in batch.column("source").to_pylist())
            listed.byte_counts.extend(compute.binary_length(batch.column("text")).to_pylist())
    if not listed.ids:
        raise UserError(f"{files[0].parent} holds no document: see what the steps before it dropped, and why")
    if len(set(listed.ids)) < len(listed.ids):
        raise UserError(f"{files[0].parent} holds an id twice: run deduplicate before this step")
    return listed


def batches(files: Sequence[Path], size: int = DOCUMENTS_AT_ONCE) -> Iterator[list[Document]]:
    """The documents, at most `size` at a time."""
    for batch in column_batches(files, size):
        yield documents_of(batch)


def column_batches(files: Sequence[Path], size: int = DOCUMENTS_AT_ONCE) -> Iterator[arrow.RecordBatch]:
    """The same as columns id, text and source."""
    for path in files:
        file = parquet.ParquetFile(path)
        yield from file.iter_batches(min(size, rows_at_once(file)), columns=_DOCUMENTS.names)


def rows_at_once(file: parquet.ParquetFile) -> int:
    """How many rows of a file to hold: DOCUMENTS_AT_ONCE, fewer where they are long."""
    groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
    longest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1.0)
    return max(1, min(DOCUMENTS_AT_ONCE, int(BYTES_AT_ONCE / max(1.0, longest))))


def documents_of(batch: arrow.RecordBatch) -> list[Document]:
    """The documents of a batch of columns."""
    columns = (batch.column(name).to_pylist() for name in _DOCUMENTS.names)
    return [Document(*row) for row in zip(*columns, strict=True)]


def rows_of(file: Path) -> Iterator[tuple[Any, ...]]:
    """The rows of a file that a RowWriter wrote."""
    for batch in parquet.ParquetFile(file).iter_batches(DOCUMENTS_AT_ONCE):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def keep_parts(documents: Path, parts: int) -> None:
    """Remove the files that none of so many parts writes: left by an earlier run that was killed."""
    names = {f"{place:05d}" for place in range(parts)}
    for file in documents.glob("*") if documents.is_dir() else ():
        if file.name.split("-")[0] not in names:
            file.unlink()


@contextmanager
def part_writers(documents: Path, dropped: Path, place: int) -> Iterator[tuple["DocumentWriter", "RowWriter"]]:
    """Where one part's documents go, in files of their own, and what it leaves out."""
    for left in documents.glob(f"*{place:05d}-*"):
        left.unlink()
    with DocumentWriter(documents, f"{place:05d}-") as writer, drop_writer(dropped) as drops:
        yield writer, drops


def excerpt(text: str, most: int = 300) -> str:
    """The beginning of a text, marked where it was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


class RowWriter:
    """A parquet file written row by row with bounded memory; it appears whole when the block ends without an error."""

    def __init__(self, path: Path, schema: arrow.Schema) -> None:
        self._path = path
        self._schema = schema
        self._building = path.with_name(f".{path.name}.building")
        self._rows: list[tuple[object, ...]] = []
        self._characters = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = parquet.ParquetWriter(self._building, schema, compression="zstd")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=error is None)

    def add(self, *row: object) -> None:
        """One row, in the order of the columns."""
        self._rows.append(row)
        self._characters += sum(len(value) for value in row if isinstance(value, str))
        if len(self._rows) >= DOCUMENTS_AT_ONCE or self._characters >= BYTES_AT_ONCE:
            self._flush()

    def add_columns(self, rows: arrow.RecordBatch) -> None:
        """Some rows more, as columns."""
        if self._rows:
            self._flush()
        self._file.write_batch(rows.cast(self._schema))

    def close(self, *, complete: bool = True) -> None:
        """Finish the file, or take back what there is of it."""
        if complete:
            self._flush()
        self._file.close()
        if complete:
            self._building.replace(self._path)
        else:
            self._building.unlink(missing_ok=True)

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else ([] for _ in self._schema)
        arrays = [arrow.array(list(column), field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._file.write_batch(arrow.record_batch(arrays, schema=self._schema))
        self._rows.clear()
        self._characters = 0


def drop_writer(path: Path) -> RowWriter:
    """A file of what was left out: id, source, reason, detail and excerpt."""
    return RowWriter(path, _DROPPED)


class DocumentWriter:
    """Documents written to numbered files of a directory, in order.

    Args:
        prefix: what the names of the files begin with.
    """

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._directory, self._prefix = directory, prefix
        self._files = 0
        self._in_file = 0
        self._file: RowWriter | None = None

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close(complete=error is None)

    def add(self, document: Document) -> None:
        """One document more."""
        self._open_file().add(document.id, document.text, document.source)
        self._in_file += 1

    def add_columns(self, documents: arrow.RecordBatch) -> None:
        """Some documents more, at most as many as a file holds, as columns id, text and source."""
        if len(documents):
            self._open_file(len(documents)).add_columns(documents.select(_DOCUMENTS.names))
            self._in_file += len(documents)

    def _open_file(self, more: int = 1) -> RowWriter:
        """The file that so many documents go to."""
        if self._file is None or self._in_file + more > DOCUMENTS_OF_FILE:
            if self._file is not None:
                self._file.close()
            self._file = RowWriter(self._directory / f"{self._prefix}{self._files:05d}.parquet", _DOCUMENTS)
            self._files, self._in_file = self._files + 1, 0
        return self._file
