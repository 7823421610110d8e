"""Texts as vectors whose cosine says how much two texts have in common.

The default needs no download: words and their character trigrams are hashed, weighted by tf-idf and projected at
random to a few hundred dimensions, which keeps cosines up to about 1/sqrt(width) (Johnson-Lindenstrauss; Achlioptas
2003, signs in place of normal numbers). A word and its trigrams share one vector, as in fastText, so that "counted" is
near "counts". A sentence-transformers model by name is the other choice, for closeness of meaning beyond shared words.
"""

import hashlib
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch.nn.functional import embedding_bag

from upweight.core.errors import UserError

BUCKETS = 1 << 15
"""Hash buckets, each with its own direction: two of them share one by chance only once in 32,768."""

WORD = re.compile(r"\w{1,24}|[^\w\s]")
"""A word, a number or one mark. Scripts without blanks come in runs of 24 and are told apart by their trigrams."""


class Embedder(ABC):
    """Makes vectors of texts."""

    width: int

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "document width"]:
        """One row a text, of length 1; a row of zeros for a text without a word."""


class HashedEmbedder(Embedder):
    """tf-idf over hashed words and trigrams, projected at random; about 5,000 documents of 1 KB a second and core.

    Args:
        width: dimensions of a vector.
        seed: of the projection; same seed and same frequencies, same vectors on every machine.

    Until `count` has seen documents all words weigh alike.
    """

    def __init__(self, width: int = 256, seed: int = 0) -> None:
        self.width = width
        signs = np.random.default_rng(seed).integers(0, 2, (BUCKETS, width), dtype=np.int8)
        self._directions = torch.from_numpy((signs * 2 - 1).astype(np.float32) / np.float32(width**0.5))
        self._documents_with = np.zeros(BUCKETS, np.int64)
        self._documents = 0

    def count(self, texts: Iterable[str]) -> None:
        """Learn from `texts` how many documents hold each word; may be called again with more."""
        words: Counter[str] = Counter()
        for text in texts:
            words.update(set(WORD.findall(text.lower())))
            self._documents += 1
        if words:
            np.add.at(self._documents_with, [hashed(word)[0] for word in words], list(words.values()))

    def save_counts(self, path: Path) -> None:
        """Write what `count` has learnt."""
        np.savez(path, documents_with=self._documents_with, documents=self._documents)

    def fingerprint(self) -> str:
        """Of what `count` has learnt."""
        return hashlib.sha256(self._documents_with.tobytes()).hexdigest()[:16]

    def load_counts(self, path: Path) -> None:
        """Take over what another of the same width and seed has learnt."""
        with np.load(path) as stored:
            self._documents_with, self._documents = stored["documents_with"], int(stored["documents"])

    def rarity(self) -> Float32[np.ndarray, " bucket"]:
        """The inverse document frequency of each bucket, ln((1 + documents) / (1 + documents with it)) + 1."""
        return np.asarray(np.log((1 + self._documents) / (1 + self._documents_with)) + 1, np.float32)

    def key_words(self, text: str, most: int) -> list[str]:
        """The words of `text` that tell it apart, by tf-idf, at most `most`; what a text search is asked for."""
        rarity = self.rarity_of
        counts = Counter(words_of_text(text))
        return sorted(counts, key=lambda word: (-(1 + np.log(counts[word])) * rarity(word), word))[:most]

    def rarity_of(self, word: str) -> float:
        """The inverse document frequency of one word."""
        return float(np.log((1 + self._documents) / (1 + self._documents_with[hashed(word)[0]])) + 1)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "document width"]:
        """One row a text, of length 1; a row of zeros for a text without a word."""
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        words: list[int] = []
        frequencies: list[int] = []
        starts: list[int] = []
        for text in texts:
            starts.append(len(words))
            counts = Counter(WORD.findall(text.lower()))
            words.extend(map(numbers.__getitem__, counts))
            frequencies.extend(counts.values())
        if not words:
            return np.zeros((len(texts), self.width), np.float32)
        buckets = [hashed(word) for word in numbers]
        weights = (1 + np.log(np.asarray(frequencies))) * self.rarity()[[b[0] for b in buckets]][words]
        vectors = self._sum_of(
            torch.from_numpy(self._word_vectors(buckets)),
            np.asarray(words),
            np.asarray(starts),
            weights.astype(np.float32),
        )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)

    def _word_vectors(self, buckets: Sequence[tuple[int, ...]]) -> Float32[np.ndarray, "word width"]:
        """Half of a word's length is its own direction, half its trigrams' together."""
        sizes = np.asarray([len(b) for b in buckets])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        weights = np.repeat((1 / np.maximum(sizes - 1, 1)) ** 0.5, sizes)
        weights[starts] = 1.0
        flat = np.fromiter((bucket for b in buckets for bucket in b), np.int64, int(sizes.sum()))
        return self._sum_of(self._directions, flat, starts, weights.astype(np.float32))

    @staticmethod
    def _sum_of(
        table: Float32[torch.Tensor, "entry width"],
        entries: Int64[np.ndarray, " use"],
        starts: Int64[np.ndarray, " bag"],
        weights: Float32[np.ndarray, " use"],
    ) -> Float32[np.ndarray, "bag width"]:
        """For each bag the weighted sum of its table rows; each bag in one fixed order, whatever the threads."""
        bags = embedding_bag(
            torch.from_numpy(entries),
            table,
            torch.from_numpy(starts),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights),
        )
        return np.asarray(bags.numpy(), np.float32)


class SentenceEmbedder(Embedder):
    """A sentence-transformers model by its hub name or directory; needs the package sentence-transformers."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            # Optional: nothing else of the package needs it.
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise UserError(
                f"the embedder {name!r} needs the extra: pip install 'upweight[embed]', or use 'hashed'"
            ) from None
        self._model: Any = SentenceTransformer(name, device=device)
        self.width = int(self._model.get_sentence_embedding_dimension())

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "document width"]:
        """One row a text, of length 1."""
        return np.asarray(self._model.encode(list(texts), normalize_embeddings=True), np.float32)


def words_of_text(text: str) -> list[str]:
    """The words and numbers of a text in lower case, without its marks."""
    return [word for word in WORD.findall(text.lower()) if word[0].isalnum()]


@lru_cache(maxsize=1 << 18)
def hashed(word: str) -> tuple[int, ...]:
    """The bucket of a word, then those of the trigrams of "<word>". CRC-32: the same in every process."""
    framed = f"<{word}>"
    grams = (framed[at : at + 3] for at in range(len(framed) - 2)) if len(word) > 2 else ()
    return tuple(zlib.crc32(part.encode("utf-8", "surrogatepass")) % BUCKETS for part in (word, *grams))
