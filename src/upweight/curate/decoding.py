"""Bytes of unknown origin as text: which encoding they are in, and what an earlier wrong guess did to them.

UTF-8 comes first, and UTF-16 or UTF-32 where a byte-order mark says so. Bytes that are no UTF-8 are taken one by one as
Windows-1252, the most common of the others: so a whole text of that encoding is read, and so is UTF-8 into which pieces
of it were pasted. Where that makes no text, there is none: binary data, or an encoding that only its author knows.

UTF-8 that somebody read as Windows-1252 ("itâ€™s") is put right where nearly all of a text's special letters are of
that kind. A few could be meant.
"""

import codecs
import re

MOST_FOREIGN_SHARE = 0.2
"""Of the bytes: more that are no UTF-8 and no ASCII are not the accents of a western language."""
MOST_CONTROL_SHARE = 0.005
"""Of the bytes: more control characters are no text."""
LEAST_MISREAD = 2
LEAST_MISREAD_SHARE = 0.8
"""Of the letters beyond ASCII: from which share of misread ones on a text is put right."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FIRST_OF_MARK = {mark[:1] for mark, _ in _MARKS}
_CONTROL = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\x1b") + b"\x7f"
_FALLBACK = "upweight-windows-1252"


def _letter_of(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)  # the five codes that Windows-1252 leaves out


_LETTERS = tuple(_letter_of(byte) for byte in range(256))
_BYTE_OF = {letter: byte for byte, letter in enumerate(_LETTERS)} | {chr(byte): byte for byte in range(128, 256)}


def _as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(_LETTERS[byte] for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_FALLBACK, _as_windows_1252)


def decode(data: bytes) -> str | None:
    """The text in some bytes, None where they hold none."""
    try:
        for mark, encoding in _MARKS if data[:1] in _FIRST_OF_MARK else ():
            if data.startswith(mark):
                return data.decode(encoding)
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        if not _may_be_text(data):
            return None
        return data.decode("utf-8", _FALLBACK)
    return repaired(text) if not text.isascii() else text


def _may_be_text(data: bytes) -> bool:
    control = len(data) - len(data.translate(None, _CONTROL))
    foreign = len(data) - len(data.decode("utf-8", "ignore").encode())
    return control <= MOST_CONTROL_SHARE * len(data) and foreign <= max(1, MOST_FOREIGN_SHARE * len(data))


def _any_of(low: int, high: int) -> str:
    return "[" + "".join(re.escape(letter) for letter, byte in _BYTE_OF.items() if low <= byte <= high) + "]"


_CONTINUED = _any_of(0x80, 0xBF)
_MISREAD = re.compile(
    f"{_any_of(0xC2, 0xDF)}{_CONTINUED}|{_any_of(0xE0, 0xEF)}{_CONTINUED}{{2}}|{_any_of(0xF0, 0xF4)}{_CONTINUED}{{3}}"
)


def repaired(text: str) -> str:
    """The text, put right where it is UTF-8 that was read as Windows-1252 or Latin-1, once or twice."""
    for _ in range(2):
        found = _MISREAD.findall(text)
        if len(found) < LEAST_MISREAD:
            return text
        beyond = sum(1 for letter in text if letter > "\x7f")
        if sum(map(len, found)) < LEAST_MISREAD_SHARE * beyond:
            return text
        text = _MISREAD.sub(_put_right, text)
    return text


def _put_right(match: re.Match[str]) -> str:
    try:
        return bytes(_BYTE_OF[letter] for letter in match[0]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]
