"""tag: the 20 quality scores of every document, by the tagger.

Writes tags.parquet (document_id, scores), in the order of the documents.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
from jaxtyping import Int64

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.core.records import HIGHEST_SCORE
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.corpus import RowWriter, batches, document_files, excerpt, rows_of
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.encoder_tagger import open_tagger
from upweight.curate.tagger import Scorer
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts, one_of_several

TAGS_SCHEMA = arrow.schema([("document_id", arrow.string()), ("scores", arrow.list_(arrow.uint8()))])
NAMES = tuple(dimension.name for dimension in DIMENSIONS)
EXTREMES_SHOWN = 2


@dataclass(frozen=True)
class Config:
    """Attributes:
    weights: a tagger that `upweight tagger train` wrote, a file or with a transformer a directory; None takes the one
        that the package ships.
    """

    weights: str | None = field(default=None, metadata=OUTSIDE)


def run(config: Config, work: Work) -> Summary:
    """Score the documents of input `documents`, file by file and side by side."""
    files = document_files(work.inputs["documents"])
    tagger = _tagger(config.weights, work.machine.device)
    seen = _Seen()
    spent = 0.0
    rows = float(sum(parquet.read_metadata(file).num_rows for file in files))
    with (
        RowWriter(work.out / "tags.parquet", TAGS_SCHEMA) as writer,
        work.monitor.track("tag", total=rows, unit="documents") as bar,
    ):
        items = [(file, config, work.machine.device) for file in files]
        encodes = config.weights is not None and Path(config.weights).is_dir()
        device = work.machine.device if encodes else "cpu"
        for place, part in enumerate(in_parts(_tag, items, work, bar, units=rows, device=device)):
            spent += part["seconds"]
            seen.add(part["seen"])
            for row in rows_of(_tags(work.out, place)):
                writer.add(*row)
    if not seen.count:
        raise UserError(f"{work.inputs['documents']} holds no document: see what the steps before it dropped, and why")
    forget(work.out)
    work.monitor.record(documents=seen.count, tagging_seconds=round(spent, 3))
    return {**seen.summary(), "tagger": dict(tagger.figures)}


def _tags(out: Path, place: int) -> Path:
    return out / DIRECTORY / f"{place:05d}.tags.parquet"


def _tag(item: tuple[Path, Config, str], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Score the documents of one file."""
    file, config, device = item
    if one_of_several():
        torch.set_num_threads(1)  # one of several workers
    tagger = _tagger(config.weights, device)
    seen = _Seen()
    started = time.perf_counter()
    with RowWriter(_tags(out, place), TAGS_SCHEMA) as writer:
        for batch in batches([file]):
            texts = [document.text for document in batch]
            scores = tagger.score(texts)
            for document, row in zip(batch, scores.tolist(), strict=True):
                writer.add(document.id, row)
            seen.look([document.source for document in batch], texts, scores)
            tick(len(batch))
    return {"seconds": time.perf_counter() - started, "seen": vars(seen)}


@lru_cache(maxsize=1)
def _tagger(weights: str | None, device: str) -> Scorer:
    """Opened once in each process; what has no transformer works on the CPU whatever the device."""
    return open_tagger(Path(weights) if weights else None, device)


class _Seen:
    """What the scores of a corpus look like, document by document; JSON data in its attributes."""

    def __init__(self) -> None:
        self.count = 0
        self.by_source: dict[str, list[Any]] = {}
        self.histogram = [[0] * (HIGHEST_SCORE + 1) for _ in NAMES]
        self.best: list[list[Any]] = []
        self.worst: list[list[Any]] = []

    def look(self, sources: list[str], texts: list[str], scores: Int64[np.ndarray, "document dimension"]) -> None:
        """Count some documents."""
        histogram = np.stack([(scores == score).sum(0) for score in range(HIGHEST_SCORE + 1)], 1)
        by_source = {}
        for source in set(sources):
            rows = [place for place, name in enumerate(sources) if name == source]
            by_source[source] = [len(rows), scores[rows].sum(0).tolist()]
        shown = sorted(map(list, zip(scores.sum(1).tolist(), sources, map(excerpt, texts), strict=True)))
        self.add(
            {
                "count": len(sources),
                "by_source": by_source,
                "histogram": histogram.tolist(),
                "best": shown[-EXTREMES_SHOWN:],
                "worst": shown[:EXTREMES_SHOWN],
            }
        )

    def add(self, other: Mapping[str, Any]) -> None:
        """Count what another has counted."""
        self.count += other["count"]
        self.histogram = (np.array(self.histogram) + np.array(other["histogram"])).tolist()
        for source, (more, totals) in other["by_source"].items():
            count, total = self.by_source.get(source, [0, [0] * len(NAMES)])
            self.by_source[source] = [count + more, [a + b for a, b in zip(total, totals, strict=True)]]
        self.worst = sorted(self.worst + other["worst"])[:EXTREMES_SHOWN]
        self.best = sorted(self.best + other["best"])[-EXTREMES_SHOWN:]

    def summary(self) -> dict[str, Any]:
        scale = np.array(self.histogram) @ np.arange(HIGHEST_SCORE + 1) / self.count
        return {
            "documents": self.count,
            "mean_scores": {name: round(float(mean), 3) for name, mean in zip(NAMES, scale, strict=True)},
            "histograms": dict(zip(NAMES, self.histogram, strict=True)),
            "mean_scores_by_source": {
                source: {name: round(sum_ / count, 2) for name, sum_ in zip(NAMES, total, strict=True)}
                for source, (count, total) in sorted(self.by_source.items())
            },
            "examples": {
                "highest": [_shown(*example) for example in reversed(self.best)],
                "lowest": [_shown(*example) for example in self.worst],
            },
        }


def _shown(total: int, source: str, text: str) -> dict[str, object]:
    return {"sum_of_scores": total, "source": source, "excerpt": text}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """About 1.5 MB of text a second and core; long documents are read in part. The tags take 30 bytes a document.

    An encoder takes 2 operations a parameter and token besides.
    """
    size = inputs["documents"].disk_bytes * 2
    encoder = Path(config.weights) if config.weights else None
    held = sum(file.stat().st_size for file in encoder.glob("*.safetensors")) if encoder and encoder.is_dir() else 0
    return Estimate(
        tokens=size / 3,
        flops=2 * held / 4 * size / 3,
        disk_bytes=size / 700 * 30,
        memory_bytes=4e8 + 2 * held,
        seconds=2 + size / 1.5e6,
    )
