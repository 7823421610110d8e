"""tag: the 20 quality scores of every document, by the tagger.

Writes tags.parquet (document_id, scores), in the order of the documents.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from jaxtyping import Int64

from upweight.core.errors import UserError
from upweight.core.records import HIGHEST_SCORE
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.corpus import RowWriter, batches, document_files, excerpt
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.tagger import Tagger

TAGS_SCHEMA = arrow.schema([("document_id", arrow.string()), ("scores", arrow.list_(arrow.uint8()))])
NAMES = tuple(dimension.name for dimension in DIMENSIONS)
EXTREMES_SHOWN = 2


@dataclass(frozen=True)
class Config:
    """Attributes:
    weights: a tagger that `upweight tagger train` wrote; None takes the one that the package ships.
    """

    weights: str | None = None


def run(config: Config, work: Work) -> Summary:
    """Score the documents of input `documents`."""
    files = document_files(work.inputs["documents"])
    tagger = Tagger.load(Path(config.weights) if config.weights else None)
    seen = _Seen()
    spent = 0.0
    with (
        RowWriter(work.out / "tags.parquet", TAGS_SCHEMA) as writer,
        work.monitor.track("tag", total=0.0, unit="documents") as bar,
    ):
        for batch in batches(files):
            started = time.perf_counter()
            scores = tagger.score([document.text for document in batch])
            spent += time.perf_counter() - started
            for document, row in zip(batch, scores.tolist(), strict=True):
                writer.add(document.id, row)
            seen.add([document.source for document in batch], [document.text for document in batch], scores)
            bar.advance(float(len(batch)))
    if not seen.count:
        raise UserError(f"{work.inputs['documents']} holds no document: see what the steps before it dropped, and why")
    work.monitor.record(documents=seen.count, tagging_seconds=round(spent, 3))
    return {**seen.summary(), "tagger": dict(tagger.figures)}


class _Seen:
    """What the scores of a corpus look like, document by document."""

    def __init__(self) -> None:
        self.count = 0
        self._by_source: dict[str, tuple[int, Int64[np.ndarray, " dimension"]]] = {}
        self._histogram = np.zeros((len(NAMES), HIGHEST_SCORE + 1), np.int64)
        self._best: list[tuple[int, str, str]] = []
        self._worst: list[tuple[int, str, str]] = []

    def add(self, sources: list[str], texts: list[str], scores: Int64[np.ndarray, "document dimension"]) -> None:
        self.count += len(sources)
        for score in range(HIGHEST_SCORE + 1):
            self._histogram[:, score] += (scores == score).sum(0)
        for source in set(sources):
            rows = [place for place, name in enumerate(sources) if name == source]
            count, total = self._by_source.get(source, (0, np.zeros(len(NAMES), np.int64)))
            self._by_source[source] = count + len(rows), total + scores[rows].sum(0)
        totals = scores.sum(1).tolist()
        shown = sorted(zip(totals, sources, map(excerpt, texts), strict=True))
        self._worst = sorted(self._worst + shown[:EXTREMES_SHOWN])[:EXTREMES_SHOWN]
        self._best = sorted(self._best + shown[-EXTREMES_SHOWN:])[-EXTREMES_SHOWN:]

    def summary(self) -> dict[str, Any]:
        scale = self._histogram @ np.arange(HIGHEST_SCORE + 1) / self.count
        return {
            "documents": self.count,
            "mean_scores": {name: round(float(mean), 3) for name, mean in zip(NAMES, scale, strict=True)},
            "histograms": {name: row.tolist() for name, row in zip(NAMES, self._histogram, strict=True)},
            "mean_scores_by_source": {
                source: {name: round(float(mean), 2) for name, mean in zip(NAMES, total / count, strict=True)}
                for source, (count, total) in sorted(self._by_source.items())
            },
            "examples": {
                "highest": [_shown(*example) for example in reversed(self._best)],
                "lowest": [_shown(*example) for example in self._worst],
            },
        }


def _shown(total: int, source: str, text: str) -> dict[str, object]:
    return {"sum_of_scores": total, "source": source, "excerpt": text}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """About 1.5 MB of text a second and core; long documents are read in part. The tags take 30 bytes a document."""
    size = inputs["documents"].disk_bytes * 2
    return Estimate(tokens=size / 3, disk_bytes=size / 700 * 30, memory_bytes=4e8, seconds=2 + size / 1.5e6)
