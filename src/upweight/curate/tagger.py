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
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Num, Shaped, UInt8
from torch.nn.functional import embedding_bag

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.records import DIMENSION_COUNT, HIGHEST_SCORE
from upweight.curate import features
from upweight.curate.features import Batch, Counts, Words
from upweight.curate.forest import Forest

SHIPPED = Path(__file__).with_name("tagger.npz")
FORMAT = fingerprint([2, features.SURFACE])
"""Changes with the features, so that no tagger reads others than it was trained on."""
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


def counts_of(batch: Batch, lowered: Batch, found: Words) -> list[Counts]:
    """The n-grams of a batch, family by family, from it, itself in lower case, and the words of that."""
    grams = [
        *features.character_grams(lowered, (4, 6)),
        *features.character_grams(batch, (3, 5)),
        found.grams,
        features.pairs_of(found.grams),
    ]
    return [features.counted(part, BITS) for part in grams]


class Seen(NamedTuple):
    """What is read off a batch of texts: the surface features, and the n-grams of each family."""

    surface: Float32[np.ndarray, "document feature"]
    counts: list[Counts]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Seen":
        """Read some texts, at least one."""
        batch = Batch.of(texts)
        lowered = batch.lowered()
        found = features.words(lowered)
        return cls(features.surface_of(texts, batch, found), counts_of(batch, lowered, found))


def coded(texts_with: Int64[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Numbers of texts on a logarithmic scale of 256 steps: what is stored of them."""
    return np.asarray(np.minimum(np.rint(np.log1p(texts_with) * _CODES_OF_LOG), 255), np.uint8)


_LOG_TEXTS = (np.arange(256) / _CODES_OF_LOG).astype(np.float32)
_LOG_TIMES = np.log(np.maximum(1, np.arange(4_096))).astype(np.float32)
_FAMILIAR = np.stack(
    [np.ones(256), _LOG_TEXTS, *(np.arange(256) <= int(coded(np.array(limit))) for limit in FAMILIAR_LIMITS)], 1
).astype(np.float32)
"""For each code a one, the logarithm, and whether it is at most each limit."""


class Sums(NamedTuple):
    """For each text, by code: its distinct n-grams, its occurrences, and the sum of (1 + ln times)^2."""

    distinct: Float32[np.ndarray, "document code"]
    occurring: Float32[np.ndarray, "document code"]
    squares: Float32[np.ndarray, "document code"]


def sums_of(
    entries: Counts, codes: UInt8[np.ndarray, " entry"], damped: Float32[np.ndarray, " entry"], size: int
) -> Sums:
    """What familiarity and lengths are made of; there are only 256 codes, so this is most of their work."""
    slot = (entries.document << 8) + codes

    def summed(weights: Num[np.ndarray, " entry"] | None) -> Float32[np.ndarray, "document code"]:
        return np.asarray(np.bincount(slot, weights, size << 8).reshape(size, 256), np.float32)

    return Sums(summed(None), summed(entries.times), summed(damped * damped))


def familiarity(sums: Sums) -> Float32[np.ndarray, "document feature"]:
    """How familiar the n-grams of each text are: the mean logarithm of how many other texts have them, and the shares
    that at most so many have (FAMILIAR_LIMITS; of all occurrences only those that no other text has).
    """
    every, occurring = sums.distinct @ _FAMILIAR, sums.occurring @ _FAMILIAR[:, :3]
    return np.concatenate(
        [every[:, 1:] / np.maximum(1, every[:, :1]), occurring[:, 1:] / np.maximum(1, occurring[:, :1])], 1
    )


def rarity(texts: int) -> Float32[np.ndarray, " code"]:
    """ln((1 + texts) / (1 + texts with it)) + 1 for each code; 0 where too few texts have it to have a weight."""
    found = np.float32(np.log1p(texts) + 1) - _LOG_TEXTS
    found[: int(coded(np.array(LEAST_TEXTS)))] = 0.0
    return found


def damping(entries: Counts) -> Float32[np.ndarray, " entry"]:
    """1 + ln times: what a frequent n-gram counts more than one that occurs once."""
    return np.asarray(1 + _LOG_TIMES[np.minimum(entries.times, len(_LOG_TIMES) - 1)])


def lengths(sums: Sums, texts: int) -> Float32[np.ndarray, " document"]:
    """The Euclidean length of each text's tf-idf vector; 1 where it is empty."""
    squared = sums.squares @ rarity(texts) ** 2
    return np.asarray(np.sqrt(np.where(squared > 0, squared, 1)), np.float32)


def bags(
    table: Float32[np.ndarray, "slot column"],
    slots: Shaped[np.ndarray, " entry"],
    entries: Counts,
    size: int,
    values: Float32[np.ndarray, " entry"],
) -> Float32[np.ndarray, "document column"]:
    """For each text the sum of the table's rows at its entries' slots, times `values`."""
    starts = np.searchsorted(entries.document, np.arange(size))
    summed = embedding_bag(
        torch.from_numpy(slots.astype(np.int64, copy=False)),
        torch.from_numpy(np.ascontiguousarray(table)),
        torch.from_numpy(starts),
        mode="sum",
        per_sample_weights=torch.from_numpy(values),
    )
    return np.asarray(summed.numpy(), np.float32)


class Scorer(ABC):
    """Scores texts on the 20 dimensions.

    Attributes:
        figures: how well it agrees with the annotator on texts held back, and how it was trained; JSON data.
    """

    figures: Mapping[str, Any]

    @abstractmethod
    def expect_of(self, excerpts: Sequence[str]) -> Float64[np.ndarray, "excerpt dimension"]:
        """The expected scores of some excerpts, at least one, before they are rounded; some lie outside 0-9."""

    def expect(self, texts: Sequence[str]) -> Float64[np.ndarray, "document dimension"]:
        """The expected scores of each text before they are rounded: the mean over its excerpts."""
        excerpts, owner = [], []
        for number, text in enumerate(texts):
            parts = excerpts_of(text)
            excerpts += parts
            owner += [number] * len(parts)
        found = np.zeros((len(texts), DIMENSION_COUNT))
        if not excerpts:
            return found
        np.add.at(found, owner, self.expect_of(excerpts))
        return np.asarray(found / np.bincount(owner, minlength=len(texts))[:, None])

    def score(self, texts: Sequence[str]) -> Int64[np.ndarray, "document dimension"]:
        """The scores of each text, integers 0-9, in the order of curate/dimensions.py."""
        return np.asarray(np.clip(np.rint(self.expect(texts)), 0, HIGHEST_SCORE), np.int64)


@dataclass(frozen=True, eq=False)
class Tagger(Scorer):
    """Scores texts on the 20 dimensions by their n-grams and how they look.

    Attributes:
        texts: how many texts it was trained on.
        codes: for each family and bucket how many of them had it (see `coded`).
        weights: of the n-grams, for each family and shared bucket.
        offset: what z is for a text without any n-gram.
        forest: the trees.
        mean, spread: of each dimension's scores.
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
                raise UserError(
                    f"{file} was trained on other features (format {about['format']}, this version reads {FORMAT}): "
                    "train it again with `upweight tagger train`"
                )
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

    def expect_of(self, excerpts: Sequence[str]) -> Float64[np.ndarray, "excerpt dimension"]:
        """The expected scores of some excerpts, at least one."""
        looks = np.concatenate(
            [self._looks(excerpts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(excerpts), TEXTS_AT_ONCE)]
        )
        return np.asarray(self.mean + self.spread * self.forest.predict(looks), np.float64)

    def _looks(self, texts: Sequence[str]) -> Float32[np.ndarray, "document feature"]:
        seen, size = Seen.of(texts), len(texts)
        familiar, z = [], np.tile(self.offset, (size, 1))
        for place, entries in enumerate(seen.counts):
            codes, damped = self.codes[place][entries.bucket], damping(entries)
            sums = sums_of(entries, codes, damped, size)
            familiar.append(familiarity(sums))
            values = damped * rarity(self.texts)[codes]
            summed = bags(self.weights[place], entries.bucket >> (BITS - WEIGHT_BITS), entries, size, values)
            z += summed / lengths(sums, self.texts)[:, None]
        return np.concatenate([seen.surface, *familiar, z], 1)


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
