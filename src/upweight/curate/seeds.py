"""Seeds of the retrieval: the documents that the others are compared with, taken from the corpus or from a file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.curate.scores import Scores
from upweight.curate.selection import DEFAULT_WEIGHTS, matches


@dataclass(frozen=True)
class SeedRule:
    """The documents of some sources that are tagged best.

    Attributes:
        sources: patterns of sources that are trusted enough to be seeds.
        floors: the least score of each named dimension.
        weights: what "best" means, by dimension.
        count: how many seeds.
        source_share: the largest share of them that one source may give, 0-1.
    """

    sources: tuple[str, ...] = ("*",)
    floors: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    count: int = 200
    source_share: float = 0.25

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.source_share <= 1:
            raise UserError(f"{self.count} seeds, {self.source_share} of one source: expected a count and a share")


@dataclass(frozen=True)
class SeedFile:
    """Texts of your own: a file of one JSON object a line, each with a "text"."""

    path: str = field(metadata=OUTSIDE)


def chosen_rows(rule: SeedRule, ids: Sequence[str], sources: Sequence[str], scores: Scores) -> list[int]:
    """The rows of the seeds, best first, ties by id. UserError where no document qualifies."""
    wanted = {source: matches(source, rule.sources) for source in set(sources)}
    reached, quality = scores.reach(rule.floors), scores.mean(rule.weights)
    rows = [row for row in np.flatnonzero(reached).tolist() if wanted[sources[row]]]
    if not rows:
        raise UserError(
            f"no document can be a seed: {sum(map(wanted.__getitem__, sources))} have a source like {rule.sources}, "
            f"{int(reached.sum())} reach {dict(rule.floors)}, none does both. Lower the floors or widen the sources"
        )
    most = max(1, int(rule.source_share * rule.count))
    taken: Counter[str] = Counter()
    seeds: list[int] = []
    for row in sorted(rows, key=lambda row: (-quality[row], ids[row])):
        if len(seeds) < rule.count and taken[sources[row]] < most:
            taken[sources[row]] += 1
            seeds.append(row)
    return seeds
