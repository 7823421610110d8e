"""What a source of documents is. It yields what it can read and a Reject for what it cannot.

A malformed record is counted and shown, and never stops the run by itself. Anything with the one method is a source; a
recipe may bring its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from upweight.core.records import Document

MAX_RECORD_BYTES = 2_000_000
EXCERPT_CHARACTERS = 200
NOT_UTF8, EMPTY, OVERSIZED, NO_OBJECT, NO_TEXT = "not UTF-8", "empty", "oversized", "no JSON object", "no text"


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that could not be read: where it stands, why, and how it begins."""

    source: str
    origin: str
    reason: str
    excerpt: str = ""


@runtime_checkable
class Source(Protocol):
    """Where documents come from, in a fixed order."""

    def documents(self) -> Iterator[Document | Reject]:
        """Everything that is there, one record after another, never all in memory."""
        ...


def decoded(data: bytes, source: str, origin: str, *, most: int = MAX_RECORD_BYTES) -> Document | Reject:
    """The document in some bytes, or why there is none."""
    if len(data) > most:
        return Reject(source, origin, OVERSIZED, begins(data))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(source, origin, NOT_UTF8, begins(data[max(0, error.start - EXCERPT_CHARACTERS // 2) :]))
    if not text.strip():
        return Reject(source, origin, EMPTY)
    return Document.of(text, source)


def begins(data: bytes) -> str:
    """How some bytes begin, readable whatever they are."""
    return data[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")


def read_file(path: Path, source: str, origin: str, *, most: int = MAX_RECORD_BYTES) -> Document | Reject:
    """A whole file as one document, or why it is none. At most `most` bytes are held."""
    with path.open("rb") as file:
        return decoded(file.read(most + 1), source, origin, most=most)
