"""The documents of an artifact, `documents/*.parquet` with columns id, text and source, read a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as compute
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.records import Document

DOCUMENTS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Listing:
    """What is known of every document without its text, in the order in which the texts are read."""

    ids: list[str]
    sources: list[str]
    byte_counts: list[int]


def document_files(artifact: Path) -> list[Path]:
    """The files of documents in an artifact, in their fixed order; UserError where there are none."""
    files = sorted((artifact / "documents").glob("*.parquet"))
    if not files:
        raise UserError(f"{artifact} holds no documents/*.parquet: is the step's input the right artifact?")
    return files


def listing(files: Sequence[Path]) -> Listing:
    """Ids, sources and UTF-8 lengths of all documents; the texts are read and forgotten batch by batch."""
    listed = Listing([], [], [])
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(DOCUMENTS_AT_ONCE, columns=["id", "text", "source"]):
            listed.ids.extend(batch.column("id").to_pylist())
            listed.sources.extend(batch.column("source").to_pylist())
            listed.byte_counts.extend(compute.binary_length(batch.column("text")).to_pylist())
    if not listed.ids:
        raise UserError(f"{files[0].parent} holds no document: see what the steps before it dropped, and why")
    if len(set(listed.ids)) < len(listed.ids):
        raise UserError(f"{files[0].parent} holds an id twice: run deduplicate before this step")
    return listed


def batches(files: Sequence[Path], size: int = DOCUMENTS_AT_ONCE) -> Iterator[list[Document]]:
    """The documents, at most `size` at a time."""
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(size, columns=["id", "text", "source"]):
            columns = (batch.column(name).to_pylist() for name in ("id", "text", "source"))
            yield [Document(*row) for row in zip(*columns, strict=True)]


def excerpt(text: str, most: int = 300) -> str:
    """The beginning of a text, marked where it was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"
