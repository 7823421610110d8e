"""Sources of documents: files of one's own, and the Python installation (installation.py). Each source is a frozen
dataclass with one method, `documents()`.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet

from upweight.core.compressed import opened
from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate.installation import PythonInstallation
from upweight.curate.source import (
    MAX_RECORD_BYTES,
    NO_OBJECT,
    NO_TEXT,
    NOT_UTF8,
    OVERSIZED,
    Reject,
    Source,
    begins,
    decoded,
    read_file,
)

__all__ = ["JsonLines", "Parquet", "PythonInstallation", "Reject", "Source", "TextTree"]


def _matching(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"no file matches {pattern!r} (looked from {Path.cwd()}): mend the path of the source")
    return found


@dataclass(frozen=True)
class JsonLines:
    """Files of one JSON object a line, plain, .gz or .zst.

    Attributes:
        paths: a path or a pattern with * and **.
        source: what the documents count as.
        text_field: the key of the text.
        source_field: a key whose value replaces `source`, where the record has it.
        max_record_bytes: longer lines are rejected, unread.
    """

    paths: str
    source: str
    text_field: str = "text"
    source_field: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES

    def documents(self) -> Iterator[Document | Reject]:
        """One document a line; blank lines are passed over."""
        for path in _matching(self.paths):
            for number, line in enumerate(_lines(path, self.max_record_bytes), start=1):
                if line is None or line.strip():
                    yield self._record(line, f"{path}, line {number}")

    def _record(self, line: bytes | None, origin: str) -> Document | Reject:
        if line is None:
            return Reject(self.source, origin, OVERSIZED)
        try:
            record = json.loads(line.decode("utf-8-sig"))  # given bytes, json would guess at UTF-16 and UTF-32
        except UnicodeDecodeError:
            return Reject(self.source, origin, NOT_UTF8, begins(line))
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            return Reject(self.source, origin, NO_OBJECT, begins(line))
        if not isinstance(record, dict):
            return Reject(self.source, origin, NO_OBJECT, begins(line))
        text = record.get(self.text_field)
        if not isinstance(text, str):
            return Reject(self.source, origin, NO_TEXT, begins(line))
        named = record.get(self.source_field) if self.source_field else None
        source = named if isinstance(named, str) and named else self.source
        # A lone surrogate can be written in JSON but not in UTF-8.
        if any("\ud800" <= letter <= "\udfff" for letter in source):
            return Reject(self.source, origin, NOT_UTF8, begins(line))
        return decoded(text.encode("utf-8", "surrogatepass"), source, origin, most=self.max_record_bytes)


def _lines(path: Path, most: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one longer than `most` bytes, which is skipped without being held."""
    with opened(path) as file:
        try:
            while line := file.readline(most + 1):
                if len(line) <= most or line.endswith(b"\n"):
                    yield line
                    continue
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield None
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path} cannot be decompressed to its end ({error}): fetch or write it again") from error


@dataclass(frozen=True)
class Parquet:
    """Parquet files with a column of texts.

    Attributes:
        paths: a path or a pattern with * and **.
        source: what the documents count as.
        text_column: the column of the texts.
        source_column: a column that replaces `source`, where it is not null.
        max_record_bytes: longer texts are rejected.
    """

    paths: str
    source: str
    text_column: str = "text"
    source_column: str | None = None
    max_record_bytes: int = MAX_RECORD_BYTES

    def documents(self) -> Iterator[Document | Reject]:
        """One document a row."""
        columns = [self.text_column, *([self.source_column] if self.source_column else [])]
        for path in _matching(self.paths):
            try:
                file = parquet.ParquetFile(path)
            except arrow.ArrowInvalid as error:
                raise UserError(f"{path} is no parquet file ({error}): mend the path of the source") from error
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}, it has {', '.join(file.schema_arrow.names)}: "
                    "set text_column (and source_column) of the source"
                )
            kind = file.schema_arrow.field(self.text_column).type
            if not (_is_text(kind) or (arrow.types.is_dictionary(kind) and _is_text(kind.value_type))):
                raise UserError(f"{path}: column {self.text_column!r} holds {kind}, not text: set text_column")
            yield from self._rows(path, file, columns)

    def _rows(self, path: Path, file: parquet.ParquetFile, columns: list[str]) -> Iterator[Document | Reject]:
        row = 0
        for batch in _batches(path, file, columns):
            texts = batch.column(self.text_column).cast(arrow.large_binary()).to_pylist()
            names = batch.column(self.source_column).to_pylist() if self.source_column else [None] * len(texts)
            for text, name in zip(texts, names, strict=True):
                row += 1
                source = str(name) if name else self.source
                yield decoded(text or b"", source, f"{path}, row {row}", most=self.max_record_bytes)


def _batches(path: Path, file: parquet.ParquetFile, columns: list[str]) -> Iterator[arrow.RecordBatch]:
    try:
        yield from file.iter_batches(1_000, columns=columns)
    except (OSError, arrow.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): fetch or write it again") from error


def _is_text(kind: arrow.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            arrow.types.is_string,
            arrow.types.is_large_string,
            arrow.types.is_binary,
            arrow.types.is_large_binary,
        )
    )


@dataclass(frozen=True)
class TextTree:
    """A directory of text files, each one document.

    Attributes:
        directory: searched with everything below it.
        source: what the documents count as.
        patterns: which files, by name.
        max_record_bytes: longer files are rejected, unread.
    """

    directory: str
    source: str
    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.rst")
    max_record_bytes: int = MAX_RECORD_BYTES

    def documents(self) -> Iterator[Document | Reject]:
        """One document a file, in the order of the paths."""
        root = Path(self.directory)
        if not root.is_dir():
            raise UserError(f"{root} is no directory (looked from {Path.cwd()}): mend the directory of the source")
        files = sorted({path for pattern in self.patterns for path in root.rglob(pattern) if path.is_file()})
        if not files:
            raise UserError(f"{root} holds no file like {', '.join(self.patterns)}: mend directory or patterns")
        for path in files:
            yield read_file(path, self.source, str(path), most=self.max_record_bytes)
