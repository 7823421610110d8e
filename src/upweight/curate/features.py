"""What a text looks like, as numbers: hashed n-grams and surface shares, for whole batches at once and in numpy alone.

Both the tagger and the default embedder read these. The texts of a batch are laid end to end as bytes; every feature
is then a vectorised pass over that one array, some tens of microseconds a document.

    gram hash   h_1(i) = b(i),  h_n(i) = h_{n-1}(i) * P + b(i + n - 1)  (mod 2^64), then (h + n) * M
    word hash   the sum of b(i) * P^(place in the word) over the bytes of the word, plus its length, then * M

A bucket is the top bits of a hash.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt64

from upweight.curate.arithmetic import arithmetic

_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_LONGEST_WORD = 64
REPEAT_BITS = 24

CLASSES = (
    *("lower", "upper", "digit", "space", "newline", "stop"),
    *("quote", "bracket", "operator", "other", "high", "odd"),
)
_MEMBERS = {
    "digit": "0123456789",
    "space": " \t",
    "newline": "\n",
    "stop": ".,;:!?",
    "quote": "\"'`",
    "bracket": "()[]{}",
    "operator": "+-*/=<>^|&%~\\",
    "other": "#$@_",
}
_PRINTABLE = np.arange(33, 127)
_LINE_NAMES = ("lines", "line_mean", "line_spread", "line_longest", "blank", "short", "stopped", "indented", "repeated")
_WORD_NAMES = ("words", "word_mean", "word_spread", "word_long", "word_single", "distinct", "commonest", "pairs_again")
_EQUATION_NAMES = ("equations_right", "equations_wrong", "equations_wrong_share", "equations_carried_share")
_TEXT_NAMES = ("bytes", "entropy", "eights_again", "starts_upper", "ends_stopped", "replacement")
SURFACE = (
    *(f"class_{name}" for name in CLASSES),
    *(f"class_{first}_{second}" for first in CLASSES for second in CLASSES),
    *(f"line_starts_{name}" for name in CLASSES),
    *(f"byte_{byte}" for byte in _PRINTABLE),
    *_LINE_NAMES,
    *_WORD_NAMES,
    *_TEXT_NAMES,
    *_EQUATION_NAMES,
)
"""The names of the surface features, in order."""


def _classes() -> UInt8[np.ndarray, " byte"]:
    table = np.full(256, CLASSES.index("odd"), np.uint8)
    table[128:] = CLASSES.index("high")
    table[ord("a") : ord("z") + 1] = CLASSES.index("lower")
    table[ord("A") : ord("Z") + 1] = CLASSES.index("upper")
    for name, members in _MEMBERS.items():
        table[[ord(member) for member in members]] = CLASSES.index(name)
    return table


_CLASS_OF = _classes()
_IN_WORD = np.isin(_CLASS_OF, [CLASSES.index(name) for name in ("lower", "upper", "digit", "high")])
_LOWERED = np.arange(256, dtype=np.uint8)
_LOWERED[ord("A") : ord("Z") + 1] += ord("a") - ord("A")
with np.errstate(over="ignore"):
    _POWERS = np.cumprod(np.full(_LONGEST_WORD, _PRIME, np.uint64))


class Batch(NamedTuple):
    """Texts laid end to end: their bytes, the document of each byte, and where each document starts and ends."""

    data: UInt8[np.ndarray, " byte"]
    document: Int64[np.ndarray, " byte"]
    starts: Int64[np.ndarray, " document"]
    ends: Int64[np.ndarray, " document"]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Batch":
        """The batch of `texts`, each followed by one newline, so that no document is empty."""
        encoded = [text.encode("utf-8", "replace") + b"\n" for text in texts]
        lengths = np.fromiter((len(text) for text in encoded), np.int64, len(encoded))
        ends = np.cumsum(lengths)
        data = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(data, np.repeat(np.arange(len(encoded), dtype=np.int64), lengths), ends - lengths, ends)

    def lowered(self) -> "Batch":
        """The same texts with ASCII letters in lower case."""
        return self._replace(data=_LOWERED[self.data])

    @property
    def size(self) -> int:
        """How many documents."""
        return len(self.starts)


class Grams(NamedTuple):
    """Occurrences: a document and the 64-bit hash of what occurs there."""

    document: Int64[np.ndarray, " gram"]
    key: UInt64[np.ndarray, " gram"]


def character_grams(batch: Batch, sizes: Sequence[int]) -> list[Grams]:
    """Every run of n bytes within a document, for each n of `sizes` in ascending order."""
    data = batch.data.astype(np.uint64)
    found, rolling = [], data
    for size in range(1, max(sizes) + 1):
        if size > 1:
            rolling = rolling[:-1] * _PRIME + data[size - 1 :]
        if size in sizes:
            first, last = batch.document[: len(rolling)], batch.document[size - 1 :]
            inside = first == last
            found.append(Grams(first[inside], (rolling[inside] + np.uint64(size)) * _MIX))
    return found


class Words(NamedTuple):
    """The words (runs of letters, digits and non-ASCII bytes) of a batch, in order, and their lengths in bytes."""

    grams: Grams
    lengths: Int64[np.ndarray, " gram"]


def words(batch: Batch) -> Words:
    """The words of each document. Bytes past the 64th of a word do not tell it from others."""
    inside = _IN_WORD[batch.data]
    edges = np.diff(inside.astype(np.int8), prepend=0)  # a document ends with a newline: no word crosses into the next
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    lengths = stops - starts
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.minimum(place, _LONGEST_WORD - 1)
    weighted = np.concatenate(([np.uint64(0)], np.cumsum(batch.data[inside].astype(np.uint64) * _POWERS[place])))
    upto = np.cumsum(lengths)
    keys = weighted[upto] - weighted[upto - lengths]
    return Words(Grams(batch.document[starts], (keys + lengths.astype(np.uint64)) * _MIX), lengths)


def pairs_of(grams: Grams, distance: int = 1) -> Grams:
    """Each gram together with the one `distance` further on in the same document."""
    first, second = grams.key[:-distance], grams.key[distance:]
    inside = grams.document[:-distance] == grams.document[distance:]
    return Grams(grams.document[:-distance][inside], ((first * _PRIME) ^ (second >> np.uint64(7)))[inside] * _MIX)


class Counts(NamedTuple):
    """How often each bucket occurs in each document: sorted by document, then bucket; no pair twice."""

    document: Int64[np.ndarray, " entry"]
    bucket: Int64[np.ndarray, " entry"]
    times: Int64[np.ndarray, " entry"]


def counted(grams: Grams, bits: int) -> Counts:
    """The occurrences of `grams` counted by document and bucket."""
    if not len(grams.document):
        return Counts(*(np.zeros(0, np.int64) for _ in Counts._fields))
    # small keys sort several times faster, and a batch of 256 documents leaves 24 bits for the bucket
    small = bits + int(grams.document[-1]).bit_length() <= 32
    joined = (grams.document << bits) | (grams.key >> np.uint64(64 - bits)).astype(np.int64)
    joined = np.sort(joined.astype(np.uint32 if small else np.int64))
    first = np.flatnonzero(np.concatenate(([True], joined[1:] != joined[:-1])))
    distinct = joined[first].astype(np.int64)
    return Counts(distinct >> bits, distinct & ((1 << bits) - 1), np.diff(first, append=len(joined)))


def _per_document(batch: Batch, document: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(np.bincount(document, weights=weights, minlength=batch.size))


def _repeated_share(batch: Batch, grams: Grams) -> np.ndarray:
    """Which share of the grams of each document occurred earlier in it."""
    entries = counted(grams, REPEAT_BITS)
    return np.asarray(1 - _per_document(batch, entries.document) / np.maximum(1, _per_document(batch, grams.document)))


def _line_features(batch: Batch, classes: np.ndarray) -> list[np.ndarray]:
    stops = np.flatnonzero(batch.data == ord("\n"))
    starts = np.concatenate(([0], stops[:-1] + 1))
    document, lengths = batch.document[stops], stops - starts
    lines = _per_document(batch, document)
    mean = _per_document(batch, document, lengths) / lines
    spread = np.sqrt(np.maximum(0, _per_document(batch, document, lengths.astype(float) ** 2) / lines - mean**2))
    longest = np.zeros(batch.size)
    np.maximum.at(longest, document, lengths)
    blank = lengths == 0
    ends_stopped = classes[np.maximum(stops - 1, 0)] == CLASSES.index("stop")
    indented = classes[starts] == CLASSES.index("space")
    written = np.maximum(1, _per_document(batch, document, ~blank))
    # lines are compared by the sum of the mixed bytes times the powers of their places: cheap, and good enough a hash
    position = np.arange(len(batch.data)) - np.repeat(starts, lengths + 1)
    rounds = (position // _LONGEST_WORD + 1).astype(np.uint64)
    hashed = (batch.data.astype(np.uint64) + np.uint64(1)) * _POWERS[position % _LONGEST_WORD] * rounds
    keys = np.add.reduceat(hashed, starts) * _MIX
    long = lengths >= 8
    repeated = _repeated_share(batch, Grams(document[long], keys[long]))
    first_class = np.bincount(document * len(CLASSES) + classes[starts], minlength=batch.size * len(CLASSES))
    line_starts = first_class.reshape(batch.size, len(CLASSES)) / lines[:, None]
    return [
        line_starts,
        np.log1p(lines),
        np.log1p(mean),
        np.log1p(spread),
        np.log1p(longest),
        _per_document(batch, document, blank) / lines,
        _per_document(batch, document, (lengths < 24) & ~blank) / written,
        _per_document(batch, document, ends_stopped & ~blank) / written,
        _per_document(batch, document, indented & ~blank) / written,
        repeated,
    ]


def _word_features(batch: Batch, found: Words) -> list[np.ndarray]:
    document, lengths = found.grams.document, found.lengths
    number = _per_document(batch, document)
    safe = np.maximum(1, number)
    mean = _per_document(batch, document, lengths) / safe
    entries = counted(found.grams, REPEAT_BITS)
    commonest = np.zeros(batch.size)
    np.maximum.at(commonest, entries.document, entries.times)
    return [
        np.log1p(number),
        mean,
        np.sqrt(np.maximum(0, _per_document(batch, document, lengths.astype(float) ** 2) / safe - mean**2)),
        _per_document(batch, document, lengths >= 9) / safe,
        _per_document(batch, document, lengths == 1) / safe,
        _per_document(batch, entries.document) / safe,
        commonest / safe,
        _repeated_share(batch, pairs_of(found.grams)),
    ]


def _equation_features(texts: Sequence[str]) -> np.ndarray:
    found = np.array([arithmetic(text) for text in texts], float)
    right, wrong, carried = found.T
    return np.stack(
        [
            np.log1p(right),
            np.log1p(wrong),
            wrong / np.maximum(1, right + wrong),
            carried / np.maximum(1, right + wrong - 1),
        ],
        1,
    )


def surface(texts: Sequence[str]) -> Float32[np.ndarray, "document feature"]:
    """The surface features of each text, in the order of SURFACE: shares, or logarithms of counts and lengths."""
    if not texts:
        return np.zeros((0, len(SURFACE)), np.float32)
    batch = Batch.of(texts)
    return surface_of(texts, batch, words(batch.lowered()))


def surface_of(texts: Sequence[str], batch: Batch, found: Words) -> Float32[np.ndarray, "document feature"]:
    """The same, where the batch of the texts and its words (in lower case) are known already."""
    kinds = len(CLASSES)
    classes = _CLASS_OF[batch.data]
    lengths = (batch.ends - batch.starts).astype(float)
    histogram = np.bincount(batch.document * 256 + batch.data, minlength=batch.size * 256).reshape(-1, 256)
    shares = histogram / lengths[:, None]
    by_class = np.stack([shares[:, kind == _CLASS_OF].sum(1) for kind in range(kinds)], 1)
    joined = classes[:-1].astype(np.int64) * kinds + classes[1:]
    inside = batch.document[:-1] == batch.document[1:]
    following = np.bincount((batch.document[:-1] * kinds**2 + joined)[inside], minlength=batch.size * kinds**2)
    following = following.reshape(-1, kinds**2) / lengths[:, None]
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
    columns = [
        np.sqrt(by_class),
        np.sqrt(following),
        *_line_features(batch, classes),
        *_word_features(batch, found),
        np.log1p(lengths),
        entropy,
        _repeated_share(batch, character_grams(batch, [8])[0]),
        classes[batch.starts] == CLASSES.index("upper"),
        classes[np.maximum(batch.ends - 2, batch.starts)] == CLASSES.index("stop"),
        np.sqrt([text.count("\ufffd") / (1 + len(text)) for text in texts]),
        _equation_features(texts),
    ]
    columns.insert(3, np.sqrt(shares[:, _PRINTABLE]))  # after the shares of what lines start with
    flat = [column[:, None] if column.ndim == 1 else column for column in columns]
    return np.concatenate(flat, 1).astype(np.float32)
