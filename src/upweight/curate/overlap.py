"""What the corpus holds twice: near duplicates by MinHash and locality-sensitive hashing.

The Jaccard similarity of two documents is the share of word 5-grams that they have in common. The share of equal
MinHash values estimates it (Broder 1997). Two documents become a candidate pair where all values of one band are equal,
    P(candidate) = 1 - (1 - s^rows)^bands        0.92 at s = 0.7, 0.998 at s = 0.8, for 20 bands of 6 rows,
and a pair where the estimate reaches the threshold. Pairs join to clusters (connected components); the first document
of each cluster in the order given stays. Contamination, the overlap with problems, is in contamination.py.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt32, UInt64

from upweight.curate.contamination import Contamination, contaminated, single_blanks, spaced_words

__all__ = [
    "Contamination",
    "MinHash",
    "clusters",
    "contaminated",
    "exact_key",
    "near_duplicates",
    "signatures",
    "signatures_of",
]

_MIX = np.uint64(0x9E3779B97F4A7C15)
_ASCII_LOWERED = bytes(
    ord(" ") if code < 128 and chr(code).isspace() else ord(chr(code).lower()) if code < 128 else code
    for code in range(256)
)


@dataclass(frozen=True)
class MinHash:
    """How near duplicates are found.

    Attributes:
        threshold: the estimated Jaccard similarity from which two documents are near duplicates, 0-1.
        words: the length of the compared runs of words.
        bands, rows: of the locality-sensitive hashing; bands * rows values make a signature.
        seed: of the hash permutations.
    """

    threshold: float = 0.8
    words: int = 5
    bands: int = 20
    rows: int = 6
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or min(self.words, self.bands, self.rows) < 1:
            raise ValueError(f"{self}: expected a threshold in (0, 1] and counts of 1 or more")


def exact_key(text: str) -> bytes:
    """Equal for texts that differ only in blanks and case."""
    if text.isascii():  # the same, several times faster
        compared = single_blanks(text.encode().translate(_ASCII_LOWERED))
    else:
        compared = " ".join(text.split()).lower().encode("utf-8", "surrogatepass")
    return hashlib.blake2b(compared, digest_size=16).digest()


def signatures(texts: Sequence[str], method: MinHash | None = None) -> UInt32[np.ndarray, "document value"]:
    """The MinHash values of each text; marks and case do not count."""
    return signatures_of([spaced_words(text) for text in texts], method)


def signatures_of(spaced: Sequence[str], method: MinHash | None = None) -> UInt32[np.ndarray, "document value"]:
    """The same of what `spaced_words` has made of texts."""
    method = method or MinHash()
    # Telemetry is off before the import. Importing takes 0.3 to 1 second, and most commands never need it.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import daft

    values = method.bands * method.rows
    if not spaced:
        return np.zeros((0, values), np.uint32)
    hashed = (
        daft.Series.from_pylist(list(spaced))
        .minhash(num_hashes=values, ngram_size=method.words, seed=method.seed, hash_function="xxhash")
        .to_arrow()
    )
    return np.asarray(hashed.flatten(), np.uint32).reshape(len(spaced), values)


def clusters(
    signed: UInt32[np.ndarray, "document value"], method: MinHash | None = None
) -> Int64[np.ndarray, " document"]:
    """For each document the first of its cluster, itself where it has no near duplicate before it."""
    method = method or MinHash()
    pairs = _candidates(signed, method)
    first, second = pairs[:, 0], pairs[:, 1]
    near = estimated_similarity(signed, first, second) >= method.threshold
    return _components(len(signed), first[near], second[near])


def estimated_similarity(
    signed: UInt32[np.ndarray, "document value"], first: Int64[np.ndarray, " pair"], second: Int64[np.ndarray, " pair"]
) -> Float64[np.ndarray, " pair"]:
    """The estimated Jaccard similarity of pairs of documents."""
    at_once = 100_000
    shares = [
        (signed[first[at : at + at_once]] == signed[second[at : at + at_once]]).mean(1)
        for at in range(0, len(first), at_once)
    ]
    return np.concatenate([np.zeros(0), *shares])


def near_duplicates(texts: Sequence[str], method: MinHash | None = None) -> Int64[np.ndarray, " document"]:
    """For each text the index of the first text of its cluster of near duplicates; its own where it is to stay.

    Texts without a word are near duplicates of none.
    """
    return clusters(signatures(texts, method), method)


def _candidates(signed: UInt32[np.ndarray, "document value"], method: MinHash) -> Int64[np.ndarray, "pair 2"]:
    """Pairs that share a band: each document with the one before it in its bucket, and with the bucket's first."""
    at_once = 100_000  # the signatures may lie on the disk
    worded = np.flatnonzero(
        np.concatenate(
            # texts without a word have no minimum
            [(signed[at : at + at_once] != np.uint32(0xFFFFFFFF)).any(1) for at in range(0, len(signed), at_once)]
            or [np.zeros(0, bool)]
        )
    )
    found = np.zeros(0, np.int64)
    for band in range(method.bands):
        keys = _keys(np.asarray(signed[:, band * method.rows : (band + 1) * method.rows])[worded])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        first_of_bucket = order[np.repeat(starts, np.diff(starts, append=len(order)))]
        later = np.flatnonzero(same) + 1
        pairs = [worded[one] * len(signed) + worded[order[later]] for one in (order[later - 1], first_of_bucket[later])]
        found = np.unique(np.concatenate([found, *pairs]))  # of each band at once: most pairs share many
    return np.stack(np.divmod(found, max(1, len(signed))), 1)


def _keys(values: UInt32[np.ndarray, "document row"]) -> UInt64[np.ndarray, " document"]:
    keys = np.zeros(len(values), np.uint64)
    for row in range(values.shape[1]):
        keys = (keys ^ values[:, row].astype(np.uint64)) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys


def _components(
    count: int, first: Int64[np.ndarray, " pair"], second: Int64[np.ndarray, " pair"]
) -> Int64[np.ndarray, " document"]:
    """The smallest member of each document's connected component: labels sink along the pairs until none moves."""
    label = np.arange(count, dtype=np.int64)
    while True:
        lower = np.minimum(label[first], label[second])
        sunk = label.copy()
        np.minimum.at(sunk, first, lower)
        np.minimum.at(sunk, second, lower)
        np.minimum.at(sunk, label[first], lower)
        np.minimum.at(sunk, label[second], lower)
        while not np.array_equal(shorter := sunk[sunk], sunk):
            sunk = shorter
        if np.array_equal(sunk, label):
            return label
        label = sunk
