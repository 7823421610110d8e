"""What a source of documents is. It yields what it can read and a Reject for what it cannot.

A malformed record, and a file that breaks off, is counted and shown, and never stops the run by itself. Anything with
the one method is a source; a recipe may bring its own. A source that can be read in parts, side by side, says so with
`parts`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from upweight.core.files import matching, raw, size_of
from upweight.core.records import Document
from upweight.curate.decoding import decode

MAX_RECORD_BYTES = 2_000_000
PART_BYTES = 64_000_000
"""Files are read side by side in parts of about this size, one file at least."""
EXCERPT_CHARACTERS = 200
NOT_UTF8, EMPTY, OVERSIZED, NO_OBJECT, NO_TEXT = "not UTF-8", "empty", "oversized", "no JSON object", "no text"
DAMAGED = "damaged file"


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that could not be read: where it stands, why, and how it begins.

    A file that cannot be opened or read to its end is one with the reason DAMAGED.
    """

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


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read by itself: how many files it is, and how many bytes where these are known.

    A run that goes on after a kill reads a part again whose files have another size now.
    """

    source: Source
    files: int = 1
    stored_bytes: int = 0


@runtime_checkable
class Divided(Source, Protocol):
    """A source whose parts, one after another, are the whole."""

    def parts(self) -> Sequence[Part]:
        """The same parts on every machine and in every run."""
        ...


def parts_of(source: Source) -> Sequence[Part]:
    """The parts of a source; the source itself where it cannot be divided."""
    return source.parts() if isinstance(source, Divided) else [Part(source)]


def listed(paths: str | Sequence[str]) -> dict[str, int]:
    """The files that paths or patterns name, in order, with their stored bytes. UserError where one names none."""
    named = [paths] if isinstance(paths, str) else paths
    return {name: size_of(name) for pattern in named for name in matching(pattern)}


def parts_of_files(sizes: Mapping[str, int], source: Callable[[tuple[str, ...]], Source]) -> list[Part]:
    """Files in their order, in parts of about PART_BYTES, one file at least.

    Args:
        source: reads those files that it is given.
    """
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > PART_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return [Part(source(tuple(group)), len(group), sum(map(sizes.__getitem__, group))) for group in groups]


def decoded(
    data: bytes, source: str, origin: str, *, most: int = MAX_RECORD_BYTES, strict: bool = False
) -> Document | Reject:
    """The document in some bytes, or why there is none.

    Args:
        strict: only UTF-8 is text, and it is taken as it is; see curate/decoding.py for what is read otherwise.
    """
    if len(data) > most:
        return Reject(source, origin, OVERSIZED, begins(data))
    try:
        text = data.decode("utf-8") if strict else decode(data)
    except UnicodeDecodeError:
        text = None
    if text is None:
        return Reject(source, origin, NOT_UTF8, begins(data))
    return as_document(text, source, origin)


def as_document(text: str, source: str, origin: str) -> Document | Reject:
    """A text as a document, or why it is none."""
    if not text.strip():
        return Reject(source, origin, EMPTY)
    return Document.of(text, source)


def begins(data: bytes) -> str:
    """How some bytes begin, readable whatever they are."""
    return data[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")


def damaged(source: str, path: Path | str, error: BaseException | str) -> Reject:
    """The reject for a file that cannot be read to its end, or at all."""
    return Reject(source, str(path), DAMAGED, str(error)[:EXCERPT_CHARACTERS])


def read_file(
    path: Path | str, source: str, origin: str, *, most: int = MAX_RECORD_BYTES, strict: bool = False
) -> Document | Reject:
    """A whole file as one document, or why it is none. At most `most` bytes are held."""
    try:
        with raw(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        return damaged(source, path, error)
    return decoded(data, source, origin, most=most, strict=strict)


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, "meta.url" for one inside another; None where there is none."""
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    within = record.get(outer)
    return field_of(within, inner) if inner and isinstance(within, Mapping) else None


def joined_text(record: Mapping[str, Any], fields: str | Sequence[str]) -> str | None:
    """The texts of some fields, a blank line between them; None where the record has none of them as text."""
    if isinstance(fields, str):
        found = field_of(record, fields)
        return found if isinstance(found, str) else None
    texts = [text for name in fields if isinstance(text := field_of(record, name), str) and text.strip()]
    return "\n\n".join(texts) if texts else None
