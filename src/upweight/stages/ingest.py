"""ingest: every source is read, each text normalised, what the basic filters drop is kept with the reason.

Writes documents/*.parquet (id, text, source) and dropped.parquet (id, source, reason, detail, excerpt). Records that
could not be read stand in dropped.parquet too, without an id; their detail says where they are. Sources may read what
lies outside the recipe, so the summary holds a fingerprint of what was read: equal texts in equal order, equal digits.
"""

import glob
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.corpus import DocumentWriter, RowWriter, drop_writer, excerpt
from upweight.curate.normalise import DEFAULT_FILTERS, Filter, check, normalise
from upweight.curate.source import Reject, Source

EXAMPLES_OF_REASON = 3
RECORDS_BEFORE_BOUND = 10_000
"""Records after which the bound on rejects is first looked at; before, a few bad ones in front would stop the run."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    sources: what is read, in order.
    filters: what is dropped at once; see curate/normalise.py.
    most_rejected_share: the largest share of records that may be unreadable, 0-1; above it the run stops.
    """

    sources: tuple[Source, ...]
    filters: tuple[Filter, ...] = DEFAULT_FILTERS
    most_rejected_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("ingest has no sources: give at least one, for example JsonLines or PythonInstallation")
        if not 0 <= self.most_rejected_share <= 1:
            raise UserError(f"most_rejected_share is {self.most_rejected_share}: it is a share, 0-1")


class _Tally:
    """What came and what became of it."""

    def __init__(self) -> None:
        self.records: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.kept_bytes: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.digest = hashlib.sha256()

    def example(self, reason: str, **shown: str) -> None:
        shown_so_far = self.examples.setdefault(reason, [])
        if len(shown_so_far) < EXAMPLES_OF_REASON:
            shown_so_far.append(shown)

    def refuse_above(self, most_share: float) -> None:
        total, rejected = self.records.total(), self.rejected.total()
        if rejected > most_share * total:
            reason, count = self.rejected.most_common(1)[0]
            where = self.examples[reason][0]["detail"]
            raise UserError(
                f"{rejected:,} of {total:,} records could not be read, more than the allowed share of {most_share:g}; "
                f"{count:,} of them for the reason {reason!r}, the first at {where}. "
                "Mend the source, or raise most_rejected_share of ingest"
            )


def run(config: Config, work: Work) -> Summary:
    """Read all sources, keep what can be read and passes the filters."""
    shutil.rmtree(work.out / "documents", ignore_errors=True)  # of an earlier run that was killed
    tally = _Tally()
    with (
        DocumentWriter(work.out / "documents") as writer,
        drop_writer(work.out / "dropped.parquet") as drops,
        work.monitor.track("read", total=_expected(config.sources), unit="documents") as bar,
    ):
        for record in _records(config.sources):
            bar.advance()
            tally.records[record.source] += 1
            if isinstance(record, Reject):
                tally.rejected[record.reason] += 1
                tally.example(
                    record.reason, source=record.source, detail=record.origin, excerpt=excerpt(record.excerpt)
                )
                drops.add("", record.source, record.reason, record.origin, excerpt(record.excerpt))
            else:
                tally.digest.update(f"{record.id} {record.source}\n".encode())
                _take(config.filters, record, writer, drops, tally)
            if tally.records.total() % RECORDS_BEFORE_BOUND == 0:
                tally.refuse_above(config.most_rejected_share)
        tally.refuse_above(config.most_rejected_share)
    if not tally.kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in (tally.rejected + tally.dropped).most_common(3))
        raise UserError(
            f"no document is left of {tally.records.total():,} records ({why or 'the sources are empty'}): "
            "give ingest other sources or wider filters"
        )
    return _summary(tally)


def _records(sources: Sequence[Source]) -> Iterator[Document | Reject]:
    for source in sources:
        yield from source.documents()


def _take(filters: Sequence[Filter], record: Document, writer: DocumentWriter, drops: RowWriter, tally: _Tally) -> None:
    document = Document.of(normalise(record.text), record.source)
    dropped = check(document.text, filters)
    if dropped is None:
        writer.add(document)
        tally.kept[document.source] += 1
        tally.kept_bytes[document.source] += len(document.text.encode())
    else:
        tally.dropped[dropped.reason] += 1
        shown = excerpt(document.text)
        tally.example(dropped.reason, source=document.source, detail=dropped.detail, excerpt=shown)
        drops.add(document.id, document.source, dropped.reason, dropped.detail, shown)


def _summary(tally: _Tally) -> dict[str, Any]:
    return {
        "records": tally.records.total(),
        "fingerprint": tally.digest.hexdigest()[:16],
        "kept": tally.kept.total(),
        "kept_bytes": tally.kept_bytes.total(),
        "rejected": dict(tally.rejected.most_common()),
        "dropped": dict(tally.dropped.most_common()),
        "by_source": {
            source: {"records": count, "kept": tally.kept[source], "kept_bytes": tally.kept_bytes[source]}
            for source, count in sorted(tally.records.items())
        },
        "examples": tally.examples,
    }


def _expected(sources: Sequence[Source]) -> float:
    """How many records to expect, for the bar: sources say `count` or `max_bytes`, or nothing."""
    known = [_records_of(source) for source in sources]
    return float(sum(known))


def _records_of(source: Source) -> float:
    if hasattr(source, "count"):
        return float(source.count)
    return float(getattr(source, "max_bytes", 0.0)) / 2_000


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """From what the sources say of themselves: a count, bytes, or files. About 5 MB or 8,000 documents a second."""
    size = sum(_bytes(source) for source in config.sources)
    return Estimate(tokens=size / 3, disk_bytes=size / 2, memory_bytes=3e8, seconds=3 + size / 4e6)


def _bytes(source: Any) -> float:
    """What a source is expected to hold; 0 where it says nothing and its files are not there yet."""
    if hasattr(source, "max_bytes") or hasattr(source, "count"):
        return float(getattr(source, "max_bytes", 250.0 * getattr(source, "count", 0)))
    files = glob.glob(source.paths, recursive=True) if hasattr(source, "paths") else ()
    return float(sum(Path(file).stat().st_size for file in files))
