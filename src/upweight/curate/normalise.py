"""Text as the corpus stores it, and the filters that need no model. A filter is one method on one document.

What a filter drops is kept with the reason. These filters drop what no later score should have to judge: too short, too
long, hardly any letters, one line over and over. Quality is for the tagger to say.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LINE_ENDS = re.compile(r"\r\n?|\u2028|\u2029|\x0c|\x0b|\x85")
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")
_TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")


def normalise(text: str) -> str:
    """The same text as the corpus stores it.

    Unicode composed (NFC), one kind of line end, no control characters, zero-width spaces or lone surrogates, no blanks
    at the ends of lines, at most two blank lines in a row, nothing around it.
    """
    if text.isascii() and not _is_changed(text):
        return text.strip()
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))
    if not text.isascii():  # composed after the removals: what stood apart may now stand together
        text = unicodedata.normalize("NFC", text)
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip()


_ASCII_REMOVED = bytes(range(0x20)).translate(None, b"\t\n") + b"\x7f"
_ASCII_BLANKS = b" \t\n\r\f\v\x1c\x1d\x1e\x1f"
_ASCII_WORDLIKE = bytes(code for code in range(128) if chr(code).isalnum()) + b"_"


def _is_changed(text: str) -> bool:
    """Whether there is anything in an ASCII text for the slower way to change. Most texts are told by their lines."""
    lines = text.split("\n")
    if all(map(str.isprintable, lines)) and not any(line.endswith(" ") for line in lines):
        return lines.count("") > 2 and "\n\n\n\n" in text
    data = text.encode()
    return (
        len(data.translate(None, _ASCII_REMOVED)) < len(data)
        or b" \n" in data
        or b"\t\n" in data
        or b"\n\n\n\n" in data
    )


class Dropped(NamedTuple):
    """Why a document is left out: a reason that is counted, and what was seen in this document."""

    reason: str
    detail: str


class Filter(ABC):
    """Says of one normalised text whether it is left out."""

    @abstractmethod
    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""


@dataclass(frozen=True)
class Length(Filter):
    """Drops texts shorter or longer than this many characters."""

    fewest: int = 40
    most: int = 200_000

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        if len(text) < self.fewest:
            return Dropped("too short", f"{len(text)} characters, at least {self.fewest}")
        if len(text) > self.most:
            return Dropped("too long", f"{len(text):,} characters, at most {self.most:,}")
        return None


@dataclass(frozen=True)
class Letters(Filter):
    """Drops texts of which too small a share is letters or digits of any script (rules, dumps, base of a table)."""

    least_share: float = 0.3

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        if text.isascii():
            data = text.encode()
            written = len(data.translate(None, _ASCII_BLANKS))
            other = len(data.translate(None, _ASCII_BLANKS + _ASCII_WORDLIKE))
        else:
            without = _BLANKS.sub("", text)
            written, other = len(without), len(_WORDLIKE.sub("", without))
        share = other / max(1, written)
        if 1 - share < self.least_share:
            return Dropped("hardly any letters", f"{1 - share:.2f} of the characters, at least {self.least_share}")
        return None


@dataclass(frozen=True)
class Repetition(Filter):
    """Drops texts of which one line, over and over, makes up most."""

    most_share: float = 0.7
    fewest_lines: int = 8

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if len(lines) < self.fewest_lines:
            return None
        line, times = Counter(lines).most_common(1)[0]
        if times > self.most_share * len(lines):
            return Dropped("one line repeated", f"{times} of {len(lines)} lines are {line[:60]!r}")
        return None


_BLANKS = re.compile(r"\s+")
_WORDLIKE = re.compile(r"\w+")

DEFAULT_FILTERS: tuple[Filter, ...] = (Length(), Letters(), Repetition())


def check(text: str, filters: Sequence[Filter]) -> Dropped | None:
    """What the first filter that objects says; None where all let the text pass."""
    for filter_ in filters:
        dropped = filter_.check(text)
        if dropped is not None:
            return dropped
    return None
