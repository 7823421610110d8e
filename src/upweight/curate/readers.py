"""Sources of documents: files of one's own, web crawls (warc.py), data sets (hub_dataset.py) and the installation of
Python (installation.py). Each source is a frozen dataclass with `documents()`.

Files lie here or in object storage ("s3://bucket/*.jsonl.zst"); see core/files.py. What has no text is a Reject, and so
is a file that is damaged: the others are read all the same.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.files import DAMAGE, OUTSIDE, is_remote, matching, opened, raw
from upweight.core.records import Document
from upweight.curate.corpus import rows_at_once
from upweight.curate.decoding import decode, repaired
from upweight.curate.hub_dataset import HubDataset
from upweight.curate.installation import PythonInstallation
from upweight.curate.source import (
    MAX_RECORD_BYTES,
    NO_OBJECT,
    NO_TEXT,
    NOT_UTF8,
    OVERSIZED,
    Part,
    Reject,
    Source,
    as_document,
    begins,
    damaged,
    decoded,
    field_of,
    joined_text,
    listed,
    parts_of_files,
    read_file,
)
from upweight.curate.warc import Warc

__all__ = ["HubDataset", "JsonLines", "Parquet", "PythonInstallation", "Reject", "Source", "TextTree", "Warc"]

TREE_FILES_OF_PART = 5_000


@dataclass(frozen=True)
class JsonLines:
    """Files of one JSON object a line, plain or compressed (.gz, .zst, .bz2, .xz).

    Attributes:
        paths: a path or a pattern with * and **, or several.
        source: what the documents count as.
        text_field: the key of the text; "meta.body" for one inside another, and several are joined by a blank line.
        source_field: a key whose value replaces `source`, where the record has it.
        max_record_bytes: longer lines are rejected, unread.
    """

    paths: str | tuple[str, ...] = field(metadata=OUTSIDE)
    source: str
    text_field: str | tuple[str, ...] = "text"
    source_field: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES

    def parts(self) -> list[Part]:
        """Its files, small ones together."""
        return parts_of_files(listed(self.paths), lambda names: replace(self, paths=names))

    def documents(self) -> Iterator[Document | Reject]:
        """One document a line; blank lines are passed over."""
        for path in listed(self.paths):
            try:
                for number, line in enumerate(_lines(path, self.max_record_bytes), start=1):
                    if line is None or line.strip():
                        yield self._record(line, f"{path}, line {number}")
            except DAMAGE as error:
                yield damaged(self.source, path, error)

    def _record(self, line: bytes | None, origin: str) -> Document | Reject:
        if line is None:
            return Reject(self.source, origin, OVERSIZED)
        written = decode(line)
        if written is None:
            return Reject(self.source, origin, NOT_UTF8, begins(line))
        try:
            record = json.loads(written)
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            return Reject(self.source, origin, NO_OBJECT, begins(line))
        if not isinstance(record, dict):
            return Reject(self.source, origin, NO_OBJECT, begins(line))
        text = joined_text(record, self.text_field)
        if text is None:
            return Reject(self.source, origin, NO_TEXT, begins(line))
        named = field_of(record, self.source_field) if self.source_field else None
        source = named if isinstance(named, str) and named else self.source
        # A lone surrogate can be written in JSON but not in UTF-8.
        if _has_surrogate(source) or _has_surrogate(text):
            return Reject(self.source, origin, NOT_UTF8, begins(line))
        return as_document(text if text.isascii() else repaired(text), source, origin)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _lines(path: str, most: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one longer than `most` bytes, which is skipped without being held."""
    with opened(path) as file:
        while line := file.readline(most + 1):
            if len(line) <= most or line.endswith(b"\n"):
                yield line
                continue
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield None


@dataclass(frozen=True)
class Parquet:
    """Parquet files with a column of texts.

    Attributes:
        paths: a path or a pattern with * and **, or several.
        source: what the documents count as.
        text_column: the column of the texts; several are joined by a blank line.
        source_column: a column that replaces `source`, where it is not null.
        max_record_bytes: longer texts are rejected.
    """

    paths: str | tuple[str, ...] = field(metadata=OUTSIDE)
    source: str
    text_column: str | tuple[str, ...] = "text"
    source_column: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES

    def parts(self) -> list[Part]:
        """Its files, small ones together."""
        return parts_of_files(listed(self.paths), lambda names: replace(self, paths=names))

    def documents(self) -> Iterator[Document | Reject]:
        """One document a row."""
        for path in listed(self.paths):
            try:
                with raw(path) as stored:
                    yield from self._rows(path, self._checked(path, parquet.ParquetFile(stored)))
            except (arrow.ArrowException, UserError, *DAMAGE) as error:
                yield damaged(self.source, path, error)

    @property
    def _text_columns(self) -> tuple[str, ...]:
        return (self.text_column,) if isinstance(self.text_column, str) else self.text_column

    def _checked(self, path: str, file: parquet.ParquetFile) -> parquet.ParquetFile:
        """The file, if it has the columns: UserError otherwise."""
        has = file.schema_arrow.names
        for name in [*self._text_columns, *([self.source_column] if self.source_column else [])]:
            if name not in has:
                raise UserError(f"no column {name!r}, it has {', '.join(has)}: set text_column and source_column")
        for name in self._text_columns:
            kind = file.schema_arrow.field(name).type
            if not (_is_text(kind) or (arrow.types.is_dictionary(kind) and _is_text(kind.value_type))):
                raise UserError(f"column {name!r} holds {kind}, not text: set text_column")
        return file

    def _rows(self, path: str, file: parquet.ParquetFile) -> Iterator[Document | Reject]:
        row = 0
        columns = [*self._text_columns, *([self.source_column] if self.source_column else [])]
        for batch in file.iter_batches(rows_at_once(file), columns=columns):
            texts = [batch.column(name).cast(arrow.large_binary()).to_pylist() for name in self._text_columns]
            names = batch.column(self.source_column).to_pylist() if self.source_column else [None] * len(batch)
            for *values, name in zip(*texts, names, strict=True):
                row += 1
                text = values[0] or b"" if len(values) == 1 else b"\n\n".join(value for value in values if value)
                source = _name_of(name) if name else self.source
                yield decoded(text, source, f"{path}, row {row}", most=self.max_record_bytes)


def _name_of(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_text(kind: arrow.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            arrow.types.is_string,
            arrow.types.is_large_string,
            arrow.types.is_string_view,
            arrow.types.is_binary,
            arrow.types.is_large_binary,
            arrow.types.is_binary_view,
        )
    )


@dataclass(frozen=True)
class TextTree:
    """A directory of text files (plain, Markdown, reStructuredText), each one document.

    Attributes:
        directory: searched with everything below it.
        source: what the documents count as.
        patterns: which files, by name.
        front_matter: keep the YAML header of a Markdown file ("---" to "---"), which is about the text.
        max_record_bytes: longer files are rejected, unread.
    """

    directory: str = field(metadata=OUTSIDE)
    source: str
    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.rst")
    front_matter: bool = True
    max_record_bytes: int = MAX_RECORD_BYTES

    def parts(self) -> list[Part]:
        """Its files in the order of their paths, thousands together."""
        files = self._files()
        starts = range(0, len(files), TREE_FILES_OF_PART)
        chosen = [tuple(files[start : start + TREE_FILES_OF_PART]) for start in starts]
        return [Part(_TextFiles(self, names), len(names)) for names in chosen]

    def documents(self) -> Iterator[Document | Reject]:
        """One document a file, in the order of the paths."""
        for path in self._files():
            yield self.read(path)

    def read(self, path: str) -> Document | Reject:
        """One file of the tree."""
        record = read_file(path, self.source, path, most=self.max_record_bytes)
        if self.front_matter or isinstance(record, Reject) or not path.endswith((".md", ".markdown")):
            return record
        return as_document(_without_front_matter(record.text), self.source, path)

    def _files(self) -> list[str]:
        patterns = self.patterns
        if is_remote(self.directory):
            found = {name for pattern in patterns for name in _matching_or_none(f"{self.directory}/**/{pattern}")}
        else:
            root = Path(self.directory)
            if not root.is_dir():
                raise UserError(f"{root} is no directory (looked from {Path.cwd()}): mend the directory of the source")
            found = {str(path) for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
        if not found:
            raise UserError(f"{self.directory} holds no file like {', '.join(patterns)}: mend directory or patterns")
        return sorted(found, key=lambda name: name.split("/"))


def _matching_or_none(pattern: str) -> list[str]:
    try:
        return matching(pattern)
    except UserError:
        return []


def _without_front_matter(text: str) -> str:
    if not text.startswith("---\n"):
        return text
    end = text.find("\n---\n", 3)
    return text[end + 5 :] if end >= 0 else text


@dataclass(frozen=True)
class _TextFiles:
    """Some files of a tree."""

    tree: TextTree
    files: tuple[str, ...]

    def documents(self) -> Iterator[Any]:
        return map(self.tree.read, self.files)
