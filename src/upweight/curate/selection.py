"""From scores to a curriculum: one utility a document, then tiers, the best documents first.

    quality(d) = weighted mean of its tag scores / 9, with the weights of its domain    0-1
    utility(d) = quality(d) + similarity_weight * similarity(d)    if its source is trusted and it reaches the floors
    utility(d) = quality(d)                                        otherwise

A retrieval hit alone never lifts a document: its source and its own scores bound that (see Lift). Documents are walked
by utility and each goes to the first tier that has room for it: room in bytes, for its source, and for documents like
it, so that no tier is all of one kind. What no tier takes is dropped, and the last tier's reason is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute
from jaxtyping import Float64, Int64

from upweight.core.errors import UserError
from upweight.curate.scores import Scores

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "knowledge_density": 1.0,
    "reasoning_density": 1.0,
    "educational_value": 2.0,
    "factual_reliability": 2.0,
    "domain_depth": 1.0,
    "coherence": 1.0,
    "explanation_clarity": 1.0,
    "cleanliness": 1.0,
    "non_repetition": 0.5,
    "character_integrity": 0.5,
}
"""Stated, not learned: content weighs more than format, as the report found it to predict usefulness better."""


WORKED_PROBLEM_WEIGHTS: Mapping[str, float] = {
    "problem_and_solution": 3.0,
    "reasoning_density": 2.0,
    "mathematical_content": 2.0,
    "educational_value": 2.0,
    "explanation_clarity": 1.0,
    "factual_reliability": 1.0,
    "coherence": 1.0,
}
"""For sources of exercises: what tells a worked solution from a bare, broken or missing one.

On 23,188 generated word problems, 28% of them damaged, they rank a sound one above a damaged one 91% of the time, the
default weights 77% (docs/log.md)."""


@dataclass(frozen=True)
class Lift:
    """How far similarity to the seeds may raise a document.

    Attributes:
        similarity_weight: what a similarity of 1 adds to the utility.
        trusted_sources: patterns of sources that may be lifted.
        floors: the least score of each named dimension below which a document is not lifted.
    """

    similarity_weight: float = 0.25
    trusted_sources: tuple[str, ...] = ("*",)
    floors: Mapping[str, int] = field(default_factory=lambda: {"factual_reliability": 4, "safety": 5})

    def __post_init__(self) -> None:
        if self.similarity_weight < 0:
            raise UserError(f"similarity_weight is {self.similarity_weight}: expected 0 or more")


@dataclass(frozen=True)
class Tier:
    """A part of the curriculum; the budget is the smaller of the two given, none where neither is.

    Attributes:
        name: names the file of its documents.
        sources: patterns of the sources that it takes.
        share: of the bytes of all documents of these sources that came in, 0-1.
        max_bytes: of UTF-8 text.
        min_utility: documents below it go on to the next tier.
        source_shares: the largest share of the tier's budget that one source may fill, by pattern ("story-*": 0.5);
            the first pattern that matches a source counts, a source that none matches is not bounded. Without a budget
            the shares are of the bytes of all documents of the tier's sources that came in.
        cluster_share: the largest share of the tier's budget that one cluster of documents that are alike may fill, as
            above; below 1 it needs clusters of retrieve.
    """

    name: str
    share: float | None = None
    max_bytes: int | None = None
    min_utility: float = 0.0
    source_shares: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[str, ...] = ("*",)
    cluster_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"{self.name!r} cannot name a tier: it becomes the name of a file")
        shares = [self.cluster_share, *self.source_shares.values(), *([] if self.share is None else [self.share])]
        if any(not 0 <= share <= 1 for share in shares):
            raise UserError(f"tier {self.name!r}: shares {shares} leave 0-1")

    def budget(self, total_bytes: int) -> int:
        """The bytes it may hold, of `total_bytes` of its sources that came in."""
        by_share = total_bytes if self.share is None else int(self.share * total_bytes)
        return by_share if self.max_bytes is None else min(by_share, self.max_bytes)

    def source_budget(self, source: str, total_bytes: int) -> int:
        """The bytes that one source may fill of it."""
        share = next((share for pattern, share in self.source_shares.items() if fnmatchcase(source, pattern)), 1.0)
        return int(share * self.budget(total_bytes))


def _domain(source: str, patterns: Iterable[str]) -> str | None:
    """The one pattern that matches a source, None where none does."""
    found = [pattern for pattern in patterns if matches(source, (pattern,))]
    if len(found) > 1:
        raise UserError(f"source {source!r} fits {found}, and each gives other weights: let one pattern match it")
    return found[0] if found else None


class Placed(NamedTuple):
    """Where a document goes: a tier, or none and why."""

    tier: str | None
    reason: str


def utilities(
    scores: Scores,
    similarity: Float64[np.ndarray, " document"],
    sources: Sequence[str],
    *,
    weights: Mapping[str, float],
    lift: Lift,
    weights_by_source: Mapping[str, Mapping[str, float]] | None = None,
) -> Float64[np.ndarray, " document"]:
    """The utility of each document, 0 to 1 + similarity_weight; see the equation above.

    Args:
        weights_by_source: weights that replace `weights` for the sources that a pattern matches.

    Raises UserError where two of these patterns match one source.
    """
    quality = scores.mean(weights)
    domains = {source: _domain(source, weights_by_source or {}) for source in set(sources)}
    for pattern, special in (weights_by_source or {}).items():
        rows = np.fromiter((domains[source] == pattern for source in sources), bool, len(sources))
        quality = np.where(rows, scores.mean(special), quality)
    trusted = {source: matches(source, lift.trusted_sources) for source in set(sources)}
    lifted = np.fromiter((trusted[source] for source in sources), bool, len(sources)) & scores.reach(lift.floors)
    return np.asarray(quality + np.where(lifted, lift.similarity_weight * similarity, 0.0))


def place(
    ids: Sequence[str],
    sources: Sequence[str],
    byte_counts: Sequence[int],
    utility: Sequence[float],
    tiers: Sequence[Tier],
    refused: Mapping[int, str],
    clusters: Sequence[int] | None = None,
) -> list[Placed]:
    """The tier of each document, in the order given.

    Args:
        ids, sources, byte_counts, utility: of the documents; equal utilities go by id.
        tiers: best first.
        refused: rows that no tier may take, with the reason.
        clusters: of the documents, where a tier bounds their shares.
    """
    names = [tier.name for tier in tiers]
    if not tiers or len(set(names)) < len(names):
        raise UserError(f"tiers {names}: expected at least one, each with a name of its own")
    taken_by = {tier.name: {source: matches(source, tier.sources) for source in set(sources)} for tier in tiers}
    totals = {
        name: sum(size for size, source in zip(byte_counts, sources, strict=True) if taken[source])
        for name, taken in taken_by.items()
    }
    budgets = {tier.name: tier.budget(totals[tier.name]) for tier in tiers}
    used = dict.fromkeys(names, 0)
    used_by: dict[tuple[str, str], int] = {}
    used_by_cluster: dict[tuple[str, int], int] = {}
    placed = [Placed(None, "")] * len(ids)
    fates: dict[Placed, Placed] = {}  # few are different, and a document refers to one
    for row in map(int, ranked(utility, ids)):
        size, source, cluster = byte_counts[row], sources[row], clusters[row] if clusters else 0
        reason = refused.get(row, "")
        chosen = None
        for tier in () if reason else tiers:
            of_source = used_by.get((tier.name, source), 0)
            of_cluster = used_by_cluster.get((tier.name, cluster), 0)
            if not taken_by[tier.name][source]:
                reason = reason or "no tier takes its source"
            elif utility[row] < tier.min_utility:
                reason = f"utility below {tier.min_utility:g}"
            elif used[tier.name] + size > budgets[tier.name]:
                reason = f"tier {tier.name} is full"
            elif of_source + size > tier.source_budget(source, totals[tier.name]):
                reason = f"source fills its share of tier {tier.name}"
            elif tier.cluster_share < 1 and of_cluster + size > int(tier.cluster_share * budgets[tier.name]):
                reason = f"cluster fills its share of tier {tier.name}"
            else:
                chosen, reason = tier.name, ""
                used[tier.name] += size
                used_by[tier.name, source] = of_source + size
                used_by_cluster[tier.name, cluster] = of_cluster + size
                break
        fate = Placed(chosen, reason)
        placed[row] = fates.setdefault(fate, fate)
    return placed


def ranked(utility: Sequence[float], ids: Sequence[str]) -> Int64[np.ndarray, " document"]:
    """The rows of documents, those of the highest utility first, equal ones by id."""
    table = arrow.table({"utility": np.asarray(utility, np.float64), "id": arrow.array(ids, arrow.string())})
    order = compute.sort_indices(table, sort_keys=[("utility", "descending"), ("id", "ascending")])
    return np.asarray(order, np.int64)


def matches(source: str, patterns: Sequence[str]) -> bool:
    """Whether a source fits one of the patterns ("story-*")."""
    return any(fnmatchcase(source, pattern) for pattern in patterns)
