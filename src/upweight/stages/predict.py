"""predict: what labels of quality tell of usefulness, several kinds of labels on the same annotated documents.

Each useful document is a sample; its score is the share of the useless documents that a regression on the labels,
fitted on other documents, ranks below it. The mean is the area under the ROC curve.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.core.identity import seed_for
from upweight.core.records import Sample
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.usefulness import FOLDS, USEFUL, USELESS, Judged, Labels, outranked, ranked, read_judged
from upweight.evals.measure import summary
from upweight.store.artifact import write_whole
from upweight.store.jsonl import write_jsonl


@dataclass(frozen=True)
class Config:
    """Attributes:
    annotated: JSON lines with id, source and scores, as `upweight annotate` writes them.
    arms: the labels to compare, by name.
    families: which documents to compare on, by name: the beginning of their sources.
    useful, useless: the sources of either kind.
    share: of the documents, those that are drawn, by the step's seed; 1 takes all.
    """

    annotated: str = field(metadata=OUTSIDE)
    arms: Mapping[str, Labels]
    families: Mapping[str, str] = field(default_factory=lambda: {"all": "", "word_problems": "word-problems-"})
    useful: tuple[str, ...] = USEFUL
    useless: tuple[str, ...] = USELESS
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not self.arms or not self.families:
            raise UserError(
                f"share {self.share}, {len(self.arms)} arms, {len(self.families)} families: expected above 0 and up to "
                "1, and at least one of each"
            )


def run(config: Config, work: Work) -> Summary:
    """Write `samples/<arm>.<family>.jsonl` and `table.json`."""
    judged = read_judged(Path(config.annotated), config.useful, config.useless)
    (work.out / "samples").mkdir(exist_ok=True)
    rows = []
    for family, prefix in config.families.items():
        drawn = _drawn(judged.of(prefix), config.share, seed_for(work.seed, family))
        if min(drawn.useful.sum(), (~drawn.useful).sum()) < FOLDS:
            raise UserError(
                f"{config.annotated}: {int(drawn.useful.sum())} useful and {int((~drawn.useful).sum())} useless "
                f"documents of the family {family!r} were drawn, at least {FOLDS} of each are needed: annotate more"
            )
        for arm, labels in config.arms.items():
            values = ranked(labels.of(drawn.scores), drawn.useful, seed_for(work.seed, "folds"))
            samples = _samples(drawn, outranked(values, drawn.useful).tolist())
            write_jsonl(work.out / "samples" / f"{arm}.{family}.jsonl", samples)
            rows.append({"checkpoint": arm, "family": family, **summary(samples)})
    write_whole(work.out / "table.json", json.dumps({"rows": rows}, indent=1))
    return {"documents": len(judged.ids), "useful": int(judged.useful.sum()), "rows": rows}


def _drawn(judged: Judged, share: float, seed: int) -> Judged:
    count = round(share * len(judged.ids))
    return judged.taken(sorted(Random(seed).sample(range(len(judged.ids)), count)))


def _samples(judged: Judged, scores: list[float]) -> list[Sample]:
    useful = [place for place, kind in enumerate(judged.useful.tolist()) if kind]
    return [
        Sample(
            judged.ids[place], 0, score, "useless documents ranked below it", "end", 0, "", judged.sources[place], None
        )
        for place, score in zip(useful, scores, strict=True)
    ]


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """A regression of 20 columns on a few thousand documents takes a tenth of a second."""
    return Estimate(seconds=0.2 * len(config.arms) * len(config.families), memory_bytes=2e8, disk_bytes=1e6)
