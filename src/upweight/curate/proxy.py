"""Weights of the quality dimensions, learnt from what a small proxy measured of some documents.

A proxy measurement is a number a document, higher for what is more useful: how far the held-out loss of a small model
falls when it trains on it, or what a model trained on its kind reaches. With s the scores as shares of the highest one,
y the measured values, both centred, y of variance 1, and w0 the stated weights at the scale that fits y best,

    w = argmin over w >= 0 of  sum over documents (y - s . w)^2 + trust * mean variance of s * |w - w0|^2

so few measurements move the stated weights a little, and many replace them. Weights are never negative: a dimension
that speaks against a document in one small sample is left out, not turned round.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from upweight.core.errors import UserError
from upweight.core.records import HIGHEST_SCORE
from upweight.curate.scores import NAMES, Scores, dimension_index
from upweight.curate.tagger_figures import agreement
from upweight.store.jsonl import iterate_jsonl

TRUST = 100.0
"""The stated weights count as so many measured documents."""
FEWEST = 50
FOLDS = 5
SWEEPS = 500


class Learnt(NamedTuple):
    """Weights by dimension, those of 0 left out, and how well they rank documents that they were not learnt from."""

    weights: Mapping[str, float]
    figures: Mapping[str, Any]


def learn(path: Path, document_ids: Sequence[str], scores: Scores, stated: Mapping[str, float], seed: int) -> Learnt:
    """Weights learnt from the measurements in `path`: JSON lines with the id of a document and a value.

    Documents that are not in the corpus are passed over. The weights sum to what the stated ones sum to.

    Raises UserError where too few documents of the corpus were measured, and where all values are equal.
    """
    values = _read(path)
    rows = [row for row, name in enumerate(document_ids) if name in values]
    measured = np.array([values[document_ids[row]] for row in rows], np.float64)
    if len(rows) < FEWEST:
        raise UserError(f"{path} measures {len(rows)} documents of this corpus: at least {FEWEST} are needed")
    if np.ptp(measured) == 0:
        raise UserError(f"{path}: the {len(rows)} measured values are all equal, so no weights follow from them")
    shares = scores.table[rows].astype(np.float64) / HIGHEST_SCORE
    prior = np.zeros(len(NAMES))
    for name, weight in stated.items():
        prior[dimension_index(name)] = weight
    weights = _fitted(shares, measured, prior)
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    predicted = np.zeros(len(rows))
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        found = _fitted(shares[inside], measured[inside], prior)
        predicted[outside] = shares[outside] @ (found / found.sum())
    if weights.sum() == 0:
        raise UserError(f"{path}: no quality dimension goes with the measured values, so no weights follow from them")
    scaled = weights * prior.sum() / weights.sum()
    figures = {
        "measured": len(rows),
        "spearman_learnt": round(_spearman(predicted, measured), 4),
        "spearman_stated": round(_spearman(shares @ prior, measured), 4),
    }
    kept = {name: round(float(weight), 4) for name, weight in zip(NAMES, scaled, strict=True) if weight > 0}
    return Learnt(kept, figures)


def _fitted(
    shares: Float64[np.ndarray, "document dimension"],
    measured: Float64[np.ndarray, " document"],
    prior: Float64[np.ndarray, " dimension"],
) -> Float64[np.ndarray, " dimension"]:
    """The minimum, by coordinate descent: in one weight at a time it is known in closed form."""
    s = shares - shares.mean(0)
    y = (measured - measured.mean()) / max(float(measured.std()), 1e-12)
    believed = s @ prior
    scale = max(0.0, float(believed @ y) / max(float(believed @ believed), 1e-12))
    penalty = TRUST * max(float(s.var(0).mean()), 1e-12)
    gram = s.T @ s + penalty * np.eye(s.shape[1])
    towards = s.T @ y + penalty * scale * prior
    weights = scale * prior
    for _ in range(SWEEPS):
        before = weights.copy()
        for place in range(len(weights)):
            others = gram[place] @ weights - gram[place, place] * weights[place]
            weights[place] = max(0.0, (towards[place] - others) / gram[place, place])
        if np.abs(weights - before).max() < 1e-9:
            break
    return np.asarray(weights)


def _spearman(first: Float64[np.ndarray, " document"], second: Float64[np.ndarray, " document"]) -> float:
    return float(agreement(first[:, None], second[:, None])[0])


def _read(path: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    for number, record in enumerate(iterate_jsonl(path, dict), start=1):
        name, value = record.get("id"), record.get("value")
        if not isinstance(name, str) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise UserError(
                f'{path}, record {number}: expected {{"id": a document, "value": a number}}, got {record!r}'
            )
        values[name] = float(value)
    return values
