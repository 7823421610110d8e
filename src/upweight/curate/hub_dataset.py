"""Data sets of the `datasets` library: a name on the Hugging Face hub, or a directory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from upweight.core.hub import open_dataset
from upweight.core.records import Document
from upweight.curate.decoding import repaired
from upweight.curate.source import (
    MAX_RECORD_BYTES,
    NO_TEXT,
    OVERSIZED,
    Reject,
    as_document,
    damaged,
    field_of,
    joined_text,
)


@dataclass(frozen=True)
class HubDataset:
    """A data set with a column of texts, read as it comes. Needs the extra `datasets`.

    Attributes:
        name: "owner/name" on the hub, or a directory that `save_to_disk` wrote.
        source: what the documents count as.
        split, subset: as `load_dataset` takes them.
        text_field: the column of the text; "meta.body" for a field inside one, several are joined by a blank line.
        source_field: a column whose value replaces `source`, where there is one.
        most: documents to take from the start; 0 takes all.
        max_record_bytes: longer texts are rejected.
    """

    name: str
    source: str
    split: str = "train"
    subset: str | None = None
    text_field: str | tuple[str, ...] = "text"
    source_field: str | None = None
    most: int = 0
    max_record_bytes: int = MAX_RECORD_BYTES

    def documents(self) -> Iterator[Document | Reject]:
        """One document a row. A connection that breaks off for good gives a reject, and ends it."""
        rows = iter(open_dataset(self.name, split=self.split, subset=self.subset, streaming=True))
        number = 0
        while not self.most or number < self.most:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError) as error:
                yield damaged(self.source, f"{self.name} after row {number}", error)
                return
            number += 1
            yield self._record(row, f"{self.name} ({self.split}), row {number}")

    def _record(self, row: Mapping[str, Any], origin: str) -> Document | Reject:
        text = joined_text(row, self.text_field)
        if text is None:
            return Reject(self.source, origin, NO_TEXT, f"it has {', '.join(row)}")
        if len(text.encode("utf-8", "surrogatepass")) > self.max_record_bytes:
            return Reject(self.source, origin, OVERSIZED, text[:200])
        named = field_of(row, self.source_field) if self.source_field else None
        return as_document(text if text.isascii() else repaired(text), str(named) if named else self.source, origin)
