"""What labels of quality tell: how well they separate documents that are useful from documents that are not.

The report (section 2.1) found labels about content to predict usefulness better than labels about format, and scores
0-9 better than binary ones. Here usefulness is what a source was chosen for: text that teaches against text that
cannot. A logistic regression on the labels is fitted on all folds but one and ranks the documents of that one; what is
measured is the area under the ROC curve, the share of pairs of a useful and a useless document that are ranked right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from upweight.core.errors import UserError
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.tagger_training import are_scores
from upweight.store.jsonl import iterate_jsonl

FOLDS = 5
PENALTY, STEPS = 1.0, 30

USEFUL = (
    *("wikipedia", "rust-book", "debian-handbook", "python-docs", "linux-docs", "sympy-docs", "maxima-docs"),
    *("gap-docs", "man-pages", "instruction-answers", "word-problems-clean"),
)
USELESS = (
    *("spam", "corrupted-ocr", "corrupted-shuffled", "corrupted-mojibake", "repeated", "data-files", "licences"),
    *(f"word-problems-{damage}" for damage in ("wrong", "bare", "typo", "garb", "rep", "eqs")),
)
"""The sources of the documents that the tagger in the package was distilled from."""


class Judged(NamedTuple):
    """Documents of both kinds with their scores."""

    ids: list[str]
    sources: list[str]
    scores: Float64[np.ndarray, "document dimension"]
    useful: Bool[np.ndarray, " document"]

    def of(self, prefix: str) -> "Judged":
        """Those whose source begins so."""
        return self.taken([place for place, source in enumerate(self.sources) if source.startswith(prefix)])

    def taken(self, places: Sequence[int]) -> "Judged":
        """Those at these places."""
        ids, sources = [self.ids[place] for place in places], [self.sources[place] for place in places]
        return Judged(ids, sources, self.scores[list(places)], self.useful[list(places)])


def read_judged(path: Path, useful: Sequence[str] = USEFUL, useless: Sequence[str] = USELESS) -> Judged:
    """The annotated documents of these sources: one JSON object a line with id, source and scores (20 numbers 0-9).

    Raises UserError where a record holds no scores, and where there are too few documents of either kind to fold.
    """
    ids: list[str] = []
    sources: list[str] = []
    scores: list[object] = []
    seen: set[str] = set()
    for number, record in enumerate(iterate_jsonl(path, dict), start=1):
        source, values = str(record.get("source", "")), record.get("scores")
        seen.add(source)
        if source not in (*useful, *useless):
            continue
        if not are_scores(values):
            raise UserError(f"{path}, record {number}: scores are {values!r}, expected {len(DIMENSIONS)} numbers 0-9")
        ids.append(str(record.get("id", number)))
        sources.append(source)
        scores.append(values)
    kinds = np.array([source in useful for source in sources], bool)
    if min(kinds.sum(), (~kinds).sum()) < FOLDS:
        raise UserError(
            f"{path} holds {int(kinds.sum())} documents of useful sources and {int((~kinds).sum())} of useless ones, "
            f"at least {FOLDS} of each are needed. Its sources are {', '.join(sorted(seen)) or 'none'}; expected are "
            f"{', '.join(useful)} against {', '.join(useless)}"
        )
    return Judged(ids, sources, np.array(scores, float), kinds)


@dataclass(frozen=True)
class Labels:
    """What of the scores a regression is told.

    Attributes:
        kind: which dimensions.
        binary: "half" tells only whether a score is 5 or more, "median" whether it is above its dimension's median.
    """

    kind: Literal["all", "content", "format"] = "all"
    binary: Literal["", "half", "median"] = ""

    def of(self, scores: Float64[np.ndarray, "document dimension"]) -> Float64[np.ndarray, "document column"]:
        """The columns that these labels give for documents' scores."""
        columns = [at for at, dimension in enumerate(DIMENSIONS) if self.kind in ("all", dimension.kind)]
        kept = scores[:, columns]
        if self.binary == "half":
            return (kept >= 5).astype(float)
        return (kept > np.median(kept, axis=0)).astype(float) if self.binary == "median" else kept


def ranked(
    rows: Float64[np.ndarray, "document column"], useful: Bool[np.ndarray, " document"], seed: int = 0
) -> Float64[np.ndarray, " document"]:
    """What a regression on the other folds says of each document, in log odds; columns are standardised on those too.

    Args:
        seed: of the division into folds.
    """
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    found = np.zeros(len(rows))
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        mean, spread = rows[inside].mean(0), rows[inside].std(0) + 1e-9
        weights = _fitted((rows[inside] - mean) / spread, useful[inside].astype(float))
        found[outside] = ((rows[outside] - mean) / spread) @ weights[:-1] + weights[-1]
    return found


def _fitted(
    rows: Float64[np.ndarray, "document column"], labels: Float64[np.ndarray, " document"]
) -> Float64[np.ndarray, " weight"]:
    """Weights and offset of a ridge-penalised logistic regression, by Newton's method."""
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    weights = np.zeros(rows.shape[1])
    ridge = PENALTY * np.eye(len(weights))
    ridge[-1, -1] = 1e-6
    for _ in range(STEPS):
        share = 1 / (1 + np.exp(-(rows @ weights)))
        gradient = rows.T @ (share - labels) + ridge @ weights
        curvature = (rows * (share * (1 - share))[:, None]).T @ rows + ridge
        weights -= np.linalg.solve(curvature, gradient)
    return weights


def outranked(
    values: Float64[np.ndarray, " document"], useful: Bool[np.ndarray, " document"]
) -> Float64[np.ndarray, " useful"]:
    """For each useful document, the share of the useless ones that are ranked below it, ties half; their mean is the
    area under the ROC curve."""
    below = np.sort(values[~useful])
    under = np.searchsorted(below, values[useful], "left")
    up_to = np.searchsorted(below, values[useful], "right")
    shares: Float64[np.ndarray, " useful"] = (under + up_to) / (2 * len(below))
    return shares
