"""Training the tagger from annotated documents, and measuring it on documents held back.

A fifth of the documents, chosen by the hash of their ids, is held back: the tagger is trained on the others and
measured on these. The tagger that is kept is then trained again on all of them, with the same settings and rounds.

The n-gram regression is kernel ridge with the mean of the six families' tf-idf kernels,
    alpha = (K + penalty I)^-1 Y,    W = X^T alpha,
on the leading principal directions of the standardised scores. The trees read its predictions, so for their training
these have to be out of fold: ten times, each tenth is predicted from the other nine.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from upweight.core.errors import UserError
from upweight.core.records import DIMENSION_COUNT, HIGHEST_SCORE
from upweight.curate.features import Counts
from upweight.curate.forest import Growth, boost, joined
from upweight.curate.tagger import (
    BITS,
    FAMILIES,
    TEXTS_AT_ONCE,
    WEIGHT_BITS,
    Seen,
    Tagger,
    coded,
    damping,
    familiarity,
    lengths,
    rarity,
    sums_of,
)
from upweight.curate.tagger_figures import as_markdown, measure
from upweight.store.jsonl import iterate_jsonl

FEWEST_DOCUMENTS = 50
KERNEL_COLUMNS = 128


@dataclass(frozen=True)
class Training:
    """How the tagger is trained.

    Attributes:
        penalty: of the n-gram regression.
        directions: of the scores that it predicts.
        folds: of its out-of-fold predictions.
        forests: boosted independently; the tagger is their mean.
        growth: of each forest.
        held_back_one_in: one in so many documents, by hash of its id, is held back for the measurement.
        seed: of the folds, trees and intervals.
    """

    penalty: float = 0.4
    directions: int = 10
    folds: int = 10
    forests: int = 3
    growth: Growth = field(default_factory=Growth)
    held_back_one_in: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Annotated:
    """Documents with their scores."""

    ids: list[str]
    texts: list[str]
    scores: Float64[np.ndarray, "document dimension"]


def read_annotated(path: Path) -> Annotated:
    """The annotated documents of a file: one JSON object a line with id, text and scores (20 numbers 0-9)."""
    found = Annotated([], [], np.zeros((0, DIMENSION_COUNT)))
    scores = []
    for number, record in enumerate(iterate_jsonl(path, dict), start=1):
        values = record.get("scores")
        if not are_scores(values):
            raise UserError(f"{path}, record {number}: scores are {values!r}, expected {DIMENSION_COUNT} numbers 0-9")
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            raise UserError(f"{path}, record {number} has no text: each line holds id, text and scores")
        found.texts.append(record["text"])
        found.ids.append(str(record.get("id", number)))
        scores.append(values)
    if len(scores) < FEWEST_DOCUMENTS:
        raise UserError(
            f"{path} holds {len(scores)} documents: at least {FEWEST_DOCUMENTS} are needed to train a tagger"
        )
    return Annotated(found.ids, found.texts, np.array(scores, float))


def are_scores(values: object) -> bool:
    """Whether these are 20 numbers from 0 to 9."""
    return (
        isinstance(values, list)
        and len(values) == DIMENSION_COUNT
        and all(isinstance(value, (int, float)) and 0 <= value <= HIGHEST_SCORE for value in values)
    )


def held_back(ids: Sequence[str], one_in: int) -> Bool[np.ndarray, " document"]:
    """Which documents are held back: decided by the hash of each id alone, so that more documents move none."""
    digests = (hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in ids)
    return np.array([int.from_bytes(digest[:4], "big") % one_in == 0 for digest in digests])


def train(documents: Annotated, training: Training | None = None) -> Tagger:
    """A tagger trained on all documents; its figures say how one trained on four fifths did on the fifth."""
    training = training or Training()
    looks = Looks.of(documents.texts)
    held = held_back(documents.ids, training.held_back_one_in)
    measured = fit(looks, documents, np.flatnonzero(~held), training, {})
    rows = np.flatnonzero(held)
    figures = measure(measured, [documents.texts[row] for row in rows], documents.scores[rows], training.seed)
    figures = {"documents": len(documents.ids), "trained_on": int((~held).sum()), **figures}
    return fit(looks, documents, np.arange(len(documents.ids)), training, figures)


@dataclass(frozen=True)
class Looks:
    """What is computed once for all documents: surface features, and the n-grams of each family."""

    surface: Float32[np.ndarray, "document feature"]
    counts: list[Counts]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Looks":
        surface, parts = [], []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            seen = Seen.of(texts[start : start + TEXTS_AT_ONCE])
            surface.append(seen.surface)
            parts.append([entries._replace(document=entries.document + start) for entries in seen.counts])
        families = [
            Counts(*(np.concatenate(columns) for columns in zip(*family, strict=True)))
            for family in zip(*parts, strict=True)
        ]
        return cls(np.concatenate(surface), families)


def fit(
    looks: Looks,
    documents: Annotated,
    rows: Int64[np.ndarray, " row"],
    training: Training,
    figures: Mapping[str, Any],
) -> Tagger:
    """A tagger trained on some rows of the documents."""
    taken = np.zeros(len(documents.ids), bool)
    taken[rows] = True
    place_of = np.cumsum(taken) - 1
    scores = documents.scores[rows]
    mean, spread = scores.mean(0), np.maximum(scores.std(0), 1e-6)
    standard = (scores - mean) / spread
    directions = np.linalg.svd(standard, full_matrices=False)[2][: training.directions]
    targets = standard @ directions.T
    texts_with, familiar, kernel, vectors = [], [], np.zeros((len(rows), len(rows)), np.float32), []
    for entries in looks.counts:
        mine = taken[entries.document]
        entries = Counts(place_of[entries.document[mine]], entries.bucket[mine], entries.times[mine])
        having = np.bincount(entries.bucket, minlength=1 << BITS)
        texts_with.append(coded(having))
        damped = damping(entries)
        # a training text must not make its own n-grams familiar
        others = coded(having[entries.bucket] - 1)
        familiar.append(familiarity(sums_of(entries, others, damped, len(rows))))
        codes = texts_with[-1][entries.bucket]
        values = damped * rarity(len(rows))[codes]
        length = lengths(sums_of(entries, codes, damped, len(rows)), len(rows))
        values /= length[entries.document] * np.float32(len(FAMILIES) ** 0.5)
        vectors.append(_sparse(entries, values, len(rows)))
        kernel += _kernel(vectors[-1])
    z = _out_of_fold(kernel, targets, training)
    alpha, offset = _ridge(kernel, targets, training.penalty)
    weights = np.stack([_transposed_product(vector, alpha) for vector in vectors])
    inputs = np.concatenate([looks.surface[rows], *familiar, z], 1).astype(np.float32)
    forests = [boost(inputs, standard, training.growth, training.seed + number) for number in range(training.forests)]
    forest = joined(forests)
    return Tagger(
        len(rows),
        np.stack(texts_with),
        # the tagger makes each family's vector of length 1; here their squared lengths are shares of the kernel's mean
        (weights / len(FAMILIES) ** 0.5).astype(np.float32),
        offset.astype(np.float32),
        forest._replace(value=forest.value / training.forests),
        mean.astype(np.float32),
        spread.astype(np.float32),
        figures,
    )


def _sparse(entries: Counts, values: Float32[np.ndarray, " entry"], size: int) -> torch.Tensor:
    """The tf-idf vectors as a sparse matrix over the shared buckets; buckets that share weights are summed."""
    places = torch.from_numpy(np.stack([entries.document, entries.bucket >> (BITS - WEIGHT_BITS)]))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(values), (size, 1 << WEIGHT_BITS), check_invariants=False
    ).coalesce()


def _kernel(vectors: torch.Tensor) -> Float32[np.ndarray, "row row"]:
    """The inner products of all rows, some columns at a time."""
    rows = vectors.shape[0]
    kernel = np.zeros((rows, rows), np.float32)
    for start in range(0, rows, KERNEL_COLUMNS):
        chosen = torch.arange(start, min(start + KERNEL_COLUMNS, rows))
        columns = vectors.index_select(0, chosen).to_dense().T.contiguous()
        kernel[:, start : start + KERNEL_COLUMNS] = torch.sparse.mm(vectors, columns).numpy()
    return kernel


def _transposed_product(
    vectors: torch.Tensor, alpha: Float64[np.ndarray, "row direction"]
) -> Float32[np.ndarray, "shared direction"]:
    transposed = vectors.transpose(0, 1).coalesce()
    return np.asarray(torch.sparse.mm(transposed, torch.from_numpy(alpha.astype(np.float32))).numpy())


def _ridge(
    kernel: Float32[np.ndarray, "row row"], targets: Float64[np.ndarray, "row direction"], penalty: float
) -> tuple[Float64[np.ndarray, "row direction"], Float64[np.ndarray, " direction"]]:
    """alpha and the offset, which is the mean of the targets."""
    offset = targets.mean(0)
    regular = kernel.astype(np.float64)
    regular[np.diag_indices_from(regular)] += penalty
    return np.linalg.solve(regular, targets - offset), offset


def _out_of_fold(
    kernel: Float32[np.ndarray, "row row"], targets: Float64[np.ndarray, "row direction"], training: Training
) -> Float64[np.ndarray, "row direction"]:
    fold = np.random.default_rng(training.seed).permutation(len(targets)) % training.folds
    predicted = np.zeros_like(targets)
    for number in range(training.folds):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        alpha, offset = _ridge(kernel[np.ix_(inside, inside)], targets[inside], training.penalty)
        predicted[outside] = kernel[np.ix_(outside, inside)] @ alpha + offset
    return predicted


def train_tagger(annotations: Path, out: Path, *, seed: int = 0, report: Path | None = None) -> dict[str, Any]:
    """Train a tagger from a file of annotated documents, write it to `out`, and return its figures.

    Args:
        annotations: one JSON object a line: id, text, scores (20 numbers 0-9, in the order of the dimensions).
        out: the tagger's file (.npz).
        seed: of the folds, trees and intervals.
        report: where to write the figures as Markdown; none is written without it.
    """
    tagger = train(read_annotated(annotations), Training(seed=seed))
    tagger.save(out)
    figures = dict(tagger.figures)
    if report is not None:
        report.write_text(as_markdown(figures), encoding="utf-8")
    return figures
