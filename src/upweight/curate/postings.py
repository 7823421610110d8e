"""Which documents hold a word: an inverted index on disk that is asked for many queries at once, ranked by BM25.

    score(q, d) = sum over the words w of q of  idf(w) * f (k + 1) / (f + k (1 - b + b |d| / mean |d|))
    idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2))

with f how often d holds w, n of N documents that hold it, k = 1.2 and b = 0.75 (Robertson and Zaragoza 2009; the
logarithm is Lucene's, which is never negative). A database's full-text index answers one query a call, and the call
costs more than the ranking; here the words of all queries are looked up together, in arrays that stay on the disk.

Documents come in segments, each with its words sorted by hash. More documents are further segments.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

SATURATION, LENGTH_SHARE = 1.2, 0.75
POSTINGS_OF_SEGMENT = 4_000_000
"""Pairs of word and document after which a segment is written: 300 MB while it is built, 6 bytes a pair on disk."""


class Ranked(NamedTuple):
    """Documents that hold a word of one query, by their row, with their scores; in the order of the rows."""

    rows: Int64[np.ndarray, " document"]
    scores: Float64[np.ndarray, " document"]


class _Segment(NamedTuple):
    """The arrays of one segment, mapped from the disk: word i stands in rows[starts[i]:starts[i + 1]]."""

    hashes: Shaped[np.ndarray, " word"]
    starts: Shaped[np.ndarray, " bound"]
    rows: Shaped[np.ndarray, " posting"]
    times: Shaped[np.ndarray, " posting"]
    lengths: Shaped[np.ndarray, " document"]


class Postings:
    """The words of documents that are numbered from 0 in the order in which they are added, below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for left in directory.glob(".*"):
            for file in left.iterdir():
                file.unlink()
            left.rmdir()
        self._segments = [_opened(path) for path in sorted(directory.glob("*"))]
        self._begin()

    def __len__(self) -> int:
        return sum(len(segment.lengths) for segment in self._segments) + len(self._lengths)

    def add(self, documents: Iterable[Sequence[str]]) -> None:
        """The words of some documents more; `flush` when there are no more."""
        for words in documents:
            counts = Counter(words)
            self._words.extend(map(self._numbers.__getitem__, counts))
            self._times.extend(counts.values())
            self._distinct.append(len(counts))
            self._lengths.append(len(words))
            if len(self._words) >= POSTINGS_OF_SEGMENT:
                self.flush()

    def flush(self) -> None:
        """Write what was added since as a segment."""
        if not self._lengths:
            return
        first = sum(len(segment.lengths) for segment in self._segments)
        hashes = np.array([_hashed(word) for word in self._numbers], np.uint64)
        by_hash = np.argsort(hashes)
        place = np.empty(len(hashes), np.int64)
        place[by_hash] = np.arange(len(hashes))
        word = place[np.array(self._words, np.int64)]
        order = np.argsort(word, kind="stable")  # the rows of a word stay in their order
        rows = np.repeat(np.arange(first, first + len(self._lengths)), self._distinct)
        number = len(self._segments)
        building = self._directory / f".{number:05d}"
        building.mkdir(parents=True, exist_ok=True)
        arrays = _Segment(
            hashes[by_hash],
            np.concatenate([[0], np.cumsum(np.bincount(word, minlength=len(hashes)))]),
            rows[order].astype(np.uint32),
            np.minimum(np.array(self._times, np.int64), 0xFFFF).astype(np.uint16)[order],
            np.array(self._lengths, np.int32),
        )
        for name, array in arrays._asdict().items():
            np.save(building / f"{name}.npy", array)
        path = building.rename(self._directory / f"{number:05d}")
        self._segments.append(_opened(path))
        self._begin()

    def search(
        self, queries: Sequence[Sequence[str]], allowed: Bool[np.ndarray, " document"] | None = None
    ) -> list[Ranked]:
        """For each query all documents that hold one of its words, of those that were flushed.

        Args:
            queries: the words of each; one that occurs twice counts once.
            allowed: whether each row may be found; None allows all.
        """
        found = self._contributions({word for query in queries for word in query})
        return [_summed([found[word] for word in dict.fromkeys(query)], allowed) for query in queries]

    def _contributions(self, words: Iterable[str]) -> Mapping[str, Ranked]:
        """What each word adds to the score of each document that holds it."""
        documents = len(self)
        mean = sum(int(segment.lengths.sum()) for segment in self._segments) / max(1, documents)
        named = list(words)
        hashes = np.array([_hashed(word) for word in named], np.uint64)
        places = [_places(segment, hashes) for segment in self._segments]
        firsts = np.cumsum([0, *(len(segment.lengths) for segment in self._segments)]).tolist()
        made = {}
        for number, word in enumerate(named):
            rows, times, lengths = [], [], []
            for segment, (starts, stops), first in zip(self._segments, places, firsts, strict=False):
                part = slice(starts[number], stops[number])
                rows.append(segment.rows[part].astype(np.int64))
                times.append(segment.times[part])
                lengths.append(segment.lengths[rows[-1] - first])
            if not rows:
                made[word] = Ranked(np.zeros(0, np.int64), np.zeros(0))
                continue
            often = np.concatenate(times).astype(np.float64)
            relative = np.concatenate(lengths) / max(mean, 1e-12)
            rarity = np.log1p((documents - len(often) + 0.5) / (len(often) + 0.5))
            damped = often + SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * relative)
            made[word] = Ranked(np.concatenate(rows), rarity * often * (SATURATION + 1) / damped)
        return made

    def _begin(self) -> None:
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self._words: list[int] = []
        self._times: list[int] = []
        self._distinct: list[int] = []
        self._lengths: list[int] = []


def _summed(parts: Sequence[Ranked], allowed: Bool[np.ndarray, " document"] | None) -> Ranked:
    if not parts:
        return Ranked(np.zeros(0, np.int64), np.zeros(0))
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    if allowed is not None:
        inside = allowed[rows]
        rows, scores = rows[inside], scores[inside]
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    new = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1]))) if len(rows) else np.zeros(0, np.int64)
    return Ranked(rows[new], np.add.reduceat(scores[order], new) if len(new) else scores)


def _places(segment: _Segment, hashes: Shaped[np.ndarray, " word"]) -> tuple[list[int], list[int]]:
    """Where the postings of each word begin and end; both 0 for a word that the segment does not have."""
    place = np.minimum(np.searchsorted(segment.hashes, hashes), max(0, len(segment.hashes) - 1))
    there = segment.hashes[place] == hashes if len(segment.hashes) else np.zeros(len(hashes), bool)
    starts = np.where(there, segment.starts[place], 0)
    stops = np.where(there, segment.starts[np.minimum(place + 1, len(segment.starts) - 1)], 0)
    return starts.tolist(), stops.tolist()


def _opened(path: Path) -> _Segment:
    # as plain arrays: numpy takes ten times as long to slice its own class for mapped files
    return _Segment(*(np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")) for name in _Segment._fields))


def _hashed(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
