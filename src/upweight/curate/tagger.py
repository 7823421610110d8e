"""The distilled tagger: the 20 quality scores of any text, some thousand texts a second on one core.

Three parts, each a plain array in one file:
    grams    z = W x, x the tf-idf vectors of six families of hashed character and word n-grams. W is a ridge regression
             on the leading directions of the scores.
    looks    s = surface shares (curate/features.py), and how familiar the n-grams are: whether other texts had them
    forest   score = mean + spread * sum over trees(s, z), rounded to 0-9. See curate/forest.py.

It is trained by `upweight tagger train` from texts that a strong model scored (curate/tagger_training.py). A long text
is scored as the mean over three excerpts of it, because the annotated texts are excerpts of at most 1,500 characters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped, UInt8
from torch.nn.functional import embedding_bag

from upweight.core.errors import UserError
from upweight.core.records import HIGHEST_SCORE
from upweight.curate import features
from upweight.curate.features import Batch, Counts
from upweight.curate.forest import Forest

SHIPPED = Path(__file__).with_name("tagger.npz")
FORMAT = 1
TEXTS_AT_ONCE = 64
EXCERPT_CHARACTERS = 1_500
EXCERPTS = 3
EXCERPT_OF_LONG = 1_200

FAMILIES = ("letters_4", "letters_6", "cased_3", "cased_5", "words", "pairs")
BITS = 18
"""Each family has 2^18 buckets, for which is known in how many texts they occur."""
WEIGHT_BITS = 16
"""The buckets share weights, four to one."""
LEAST_TEXTS = 3
"""What fewer texts have has no weight."""
FAMILIAR_LIMITS = (0, 3, 30)
_CODES_OF_LOG = 30.0


def counts_of(batch: Batch) -> list[Counts]:
    """The n-grams of a batch, family by family."""
    lowered = batch.lowered()
    found = features.words(lowered).grams
    grams = [
        *features.character_grams(lowered, (4, 6)),
        *features.character_grams(batch, (3, 5)),
        found,
        features.pairs_of(found),
    ]
    return [features.counted(part, BITS) for part in grams]


def coded(texts_with: Int64[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Numbers of texts on a logarithmic scale of 256 steps: what is stored of them."""
    return np.asarray(np.minimum(np.rint(np.log1p(texts_with) * _CODES_OF_LOG), 255), np.uint8)


_LOG_TEXTS = (np.arange(256) / _CODES_OF_LOG).astype(np.float32)
_FAMILIAR = np.stack(
    [np.ones(256), _LOG_TEXTS, *(np.arange(256) <= int(coded(np.array(limit))) for limit in FAMILIAR_LIMITS)], 1
).astype(np.float32)
"""For each code a one, the logarithm, and whether it is at most each limit."""


def familiarity(
    entries: Counts, codes: UInt8[np.ndarray, " entry"], size: int
) -> Float32[np.ndarray, "document feature"]:
    """How familiar the n-grams of each text are; `codes` says for each entry how many other texts have it."""
    every = bags(_FAMILIAR, codes, entries, size)
    occurring = bags(_FAMILIAR[:, :3], codes, entries, size, entries.times.astype(np.float32))
    return np.concatenate(
        [every[:, 1:] / np.maximum(1, every[:, :1]), occurring[:, 1:] / np.maximum(1, occurring[:, :1])], 1
    )


def weighted(entries: Counts, codes: UInt8[np.ndarray, " entry"], texts: int) -> Float32[np.ndarray, " entry"]:
    """tf-idf of each entry, (1 + ln times) * (ln((1 + texts) / (1 + texts with it)) + 1)."""
    rarity = np.float32(np.log1p(texts) + 1) - _LOG_TEXTS
    rarity[: int(coded(np.array(LEAST_TEXTS)))] = 0.0
    return np.asarray((1 + np.log(entries.times, dtype=np.float32)) * rarity[codes])


def lengths(entries: Counts, values: Float32[np.ndarray, " entry"], size: int) -> Float32[np.ndarray, " document"]:
    """The Euclidean length of each text's vector; 1 where it is empty."""
    summed = np.bincount(entries.document, values * values, size)
    return np.sqrt(np.where(summed > 0, summed, 1)).astype(np.float32)


def bags(
    table: Float32[np.ndarray, "slot column"],
    slots: Shaped[np.ndarray, " entry"],
    entries: Counts,
    size: int,
    values: Float32[np.ndarray, " entry"] | None = None,
) -> Float32[np.ndarray, "document column"]:
    """For each text the sum of the table's rows at its entries' slots, times `values` where given."""
    starts = np.searchsorted(entries.document, np.arange(size))
    summed = embedding_bag(
        torch.from_numpy(slots.astype(np.int64, copy=False)),
        torch.from_numpy(np.ascontiguousarray(table)),
        torch.from_numpy(starts),
        mode="sum",
        per_sample_weights=None if values is None else torch.from_numpy(values),
    )
    return np.asarray(summed.numpy(), np.float32)


@dataclass(frozen=True, eq=False)
class Tagger:
    """Scores texts on the 20 dimensions.

    Attributes:
        texts: how many texts it was trained on.
        codes: for each family and bucket how many of them had it (see `coded`).
        weights: of the n-grams, for each family and shared bucket.
        offset: what z is for a text without any n-gram.
        forest: the trees.
        mean, spread: of each dimension's scores.
        figures: how well it agrees with the annotator on texts held back, and how it was trained; JSON data.
    """

    texts: int
    codes: UInt8[np.ndarray, "family bucket"]
    weights: Float32[np.ndarray, "family shared direction"]
    offset: Float32[np.ndarray, " direction"]
    forest: Forest
    mean: Float32[np.ndarray, " dimension"]
    spread: Float32[np.ndarray, " dimension"]
    figures: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | None = None) -> "Tagger":
        """The tagger in a file that `save` wrote; without a path the one that the package ships."""
        file = path or SHIPPED
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            about = json.loads(str(arrays["about"]))
            if about["format"] != FORMAT:
                raise UserError(f"{file} has format {about['format']}, this version reads {FORMAT}: train it again")
            return _unpacked(arrays, about)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist: give the file that `upweight tagger train` wrote") from None
        except (ValueError, KeyError, BadZipFile, EOFError) as error:
            raise UserError(f"{file} is no tagger ({error}): give a file that `upweight tagger train` wrote") from error

    def save(self, path: Path) -> None:
        """Write it to one file, weights in 8 bits and tree values in 16."""
        scale = np.abs(self.weights).max((1, 2), keepdims=True) / 127
        arrays = {
            "about": np.array(json.dumps({"format": FORMAT, "texts": self.texts, "figures": self.figures})),
            "codes": self.codes,
            "weights": np.rint(self.weights / np.maximum(scale, 1e-12)).astype(np.int8),
            "scale": scale.astype(np.float32),
            "offset": self.offset,
            "roots": self.forest.roots,
            "feature": self.forest.feature.astype(np.uint16),
            "threshold": self.forest.threshold,
            "step": (self.forest.below - np.arange(len(self.forest.below))).astype(np.uint8),
            "value": self.forest.value[_leaves(self.forest)].astype(np.float16),
            "mean": self.mean,
            "spread": self.spread,
        }
        building = path.with_name(f".{path.name}.building")
        with building.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        building.replace(path)

    def score(self, texts: Sequence[str]) -> Int64[np.ndarray, "document dimension"]:
        """The scores of each text, integers 0-9, in the order of curate/dimensions.py."""
        return np.asarray(np.clip(np.rint(self.expect(texts)), 0, HIGHEST_SCORE), np.int64)

    def expect(self, texts: Sequence[str]) -> Float64[np.ndarray, "document dimension"]:
        """The expected scores before they are rounded; they may lie a little outside 0-9."""
        excerpts, owner = [], []
        for number, text in enumerate(texts):
            parts = excerpts_of(text)
            excerpts += parts
            owner += [number] * len(parts)
        found = np.zeros((len(texts), len(self.mean)))
        if not excerpts:
            return found
        looks = np.concatenate(
            [self._looks(excerpts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(excerpts), TEXTS_AT_ONCE)]
        )
        expected = self.mean + self.spread * self.forest.predict(looks)
        np.add.at(found, owner, expected)
        return np.asarray(found / np.bincount(owner, minlength=len(texts))[:, None])

    def _looks(self, texts: Sequence[str]) -> Float32[np.ndarray, "document feature"]:
        batch = Batch.of(texts)
        counts = counts_of(batch)
        codes = [self.codes[place][entries.bucket] for place, entries in enumerate(counts)]
        familiar = [familiarity(entries, code, batch.size) for entries, code in zip(counts, codes, strict=True)]
        z = np.tile(self.offset, (batch.size, 1))
        for place, (entries, code) in enumerate(zip(counts, codes, strict=True)):
            values = weighted(entries, code, self.texts)
            summed = bags(self.weights[place], entries.bucket >> (BITS - WEIGHT_BITS), entries, batch.size, values)
            z += summed / lengths(entries, values, batch.size)[:, None]
        return np.concatenate([features.surface(texts), *familiar, z], 1)


def excerpts_of(text: str) -> list[str]:
    """A short text itself; of a long one its beginning, middle and end."""
    if len(text) <= EXCERPT_CHARACTERS:
        return [text]
    last = len(text) - EXCERPT_OF_LONG
    starts = (last * place // (EXCERPTS - 1) for place in range(EXCERPTS))
    return [text[start : start + EXCERPT_OF_LONG] for start in starts]


def _leaves(forest: Forest) -> Any:
    return forest.below == np.arange(len(forest.below))


def _unpacked(arrays: Mapping[str, Any], about: Mapping[str, Any]) -> Tagger:
    below = np.arange(len(arrays["feature"]), dtype=np.int32) + arrays["step"]
    leaves = arrays["step"] == 0
    value = np.zeros((len(below), arrays["value"].shape[1]), np.float32)
    value[leaves] = arrays["value"]
    forest = Forest(
        arrays["roots"],
        arrays["feature"].astype(np.int32),
        arrays["threshold"],
        below.astype(np.int32),
        value,
        _depth(arrays["roots"], below, leaves),
    )
    weights = arrays["weights"].astype(np.float32) * arrays["scale"]
    return Tagger(
        int(about["texts"]),
        arrays["codes"],
        weights,
        arrays["offset"],
        forest,
        arrays["mean"],
        arrays["spread"],
        about["figures"],
    )


def _depth(roots: Any, below: Any, leaves: Any) -> int:
    """How many steps it takes until every walk has reached a leaf."""
    depth, level = 0, np.asarray(roots)
    while len(level := level[~leaves[level]]):
        level = np.concatenate([below[level], below[level] + 1])
        depth += 1
    return depth
