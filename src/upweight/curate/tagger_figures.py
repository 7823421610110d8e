"""How well a tagger agrees with the annotator: Spearman's rank correlation and mean absolute error by dimension."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from upweight.core.errors import UserError
from upweight.core.records import Tags
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.tagger import Scorer

RESAMPLES = 500


def measure(
    tagger: Scorer, texts: Sequence[str], scores: Float64[np.ndarray, "document dimension"], seed: int = 0
) -> dict[str, Any]:
    """Spearman correlation and mean absolute error of each dimension, with 95% bootstrap intervals over documents."""
    found = tagger.score(texts).astype(float)
    random = np.random.default_rng(seed)
    samples = random.integers(0, len(texts), (RESAMPLES, len(texts)))
    spearman, errors = agreement(found, scores), np.abs(found - scores)
    by_sample = np.array([agreement(found[sample], scores[sample]) for sample in samples])
    error_by_sample = np.array([errors[sample].mean(0) for sample in samples])
    return {
        "held_back": len(texts),
        "spearman": round(float(spearman.mean()), 4),
        "spearman_interval": _interval(by_sample.mean(1)),
        "mean_absolute_error": round(float(errors.mean()), 4),
        "mean_absolute_error_interval": _interval(error_by_sample.mean(1)),
        "by_dimension": {
            dimension.name: {
                "spearman": round(float(spearman[place]), 4),
                "spearman_interval": _interval(by_sample[:, place]),
                "mean_absolute_error": round(float(errors[:, place].mean()), 4),
                "mean_absolute_error_interval": _interval(error_by_sample[:, place]),
                "bias": round(float((found - scores)[:, place].mean()), 4),
            }
            for place, dimension in enumerate(DIMENSIONS)
        },
    }


def agreement(
    first: Float64[np.ndarray, "document dimension"], second: Float64[np.ndarray, "document dimension"]
) -> Float64[np.ndarray, " dimension"]:
    """Spearman's rank correlation of each column, ties at their mean rank; 0 where a column is constant."""
    found = np.zeros(first.shape[1])
    for column in range(first.shape[1]):
        a, b = ranks(first[:, column]), ranks(second[:, column])
        a, b = a - a.mean(), b - b.mean()
        size = np.sqrt((a**2).sum() * (b**2).sum())
        found[column] = (a * b).sum() / size if size > 0 else 0.0
    return found


def between_annotators(passes: Sequence[Mapping[str, Tags]]) -> dict[str, Any]:
    """How well annotators agree on the documents that all of them scored: the means over all pairs of them.

    Args:
        passes: for each annotator its scores by document id.

    Raises UserError where fewer than two of them have three documents in common.
    """
    common = sorted(set.intersection(*(set(found) for found in passes))) if len(passes) > 1 else []
    if len(common) < 3:
        raise UserError(f"{len(passes)} annotators have {len(common)} documents in common: agreement needs 2 and 3")
    tables = [np.array([found[name].scores for name in common], float) for found in passes]
    pairs = list(combinations(tables, 2))
    spearman = np.mean([agreement(first, second) for first, second in pairs], axis=0)
    apart = np.mean([np.abs(first - second).mean(0) for first, second in pairs], axis=0)
    return {
        "annotators": len(passes),
        "documents": len(common),
        "spearman": round(float(spearman.mean()), 4),
        "mean_absolute_difference": round(float(apart.mean()), 4),
        "by_dimension": {
            dimension.name: {
                "spearman": round(float(spearman[place]), 4),
                "mean_absolute_difference": round(float(apart[place]), 4),
            }
            for place, dimension in enumerate(DIMENSIONS)
        },
    }


def ranks(values: Shaped[np.ndarray, " document"]) -> Float64[np.ndarray, " document"]:
    """The rank of each value, equal values at the mean of their ranks."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(times) - (times - 1) / 2)[place])


def _interval(samples: Float64[np.ndarray, " sample"]) -> list[float]:
    return [round(float(bound), 4) for bound in np.quantile(samples, (0.025, 0.975))]


def as_markdown(figures: Mapping[str, Any]) -> str:
    """The figures of a tagger as a page."""
    low, high = figures["spearman_interval"]
    error_low, error_high = figures["mean_absolute_error_interval"]
    rows = [
        f"| {name} | {row['spearman']:.3f} | {row['spearman_interval'][0]:.3f}-{row['spearman_interval'][1]:.3f} "
        f"| {row['mean_absolute_error']:.2f} | {row['mean_absolute_error_interval'][0]:.2f}-"
        f"{row['mean_absolute_error_interval'][1]:.2f} | {row['bias']:+.2f} |"
        for name, row in figures["by_dimension"].items()
    ]
    return "\n".join(
        [
            "# The tagger",
            "",
            f"Trained on {figures['trained_on']:,} annotated documents, measured on {figures['held_back']:,} others. "
            "Those were held back by the hash of their ids. Scores are the integers 0-9 that the tagger gives; "
            "intervals are 95%, bootstrap over documents. The file holds a tagger that was trained again on all "
            f"{figures['documents']:,}, with the same settings.",
            "",
            f"Mean Spearman correlation with the annotator **{figures['spearman']:.3f}** ({low:.3f}-{high:.3f}), "
            f"mean absolute error **{figures['mean_absolute_error']:.2f}** ({error_low:.2f}-{error_high:.2f}).",
            "",
            "| dimension | Spearman | 95% | mean absolute error | 95% | bias |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )
