"""ingest: every source is read, each text normalised, what the basic filters drop is kept with the reason.

Writes documents/*.parquet (id, text, source) and dropped.parquet (id, source, reason, detail, excerpt). Records that
could not be read stand in dropped.parquet too, without an id; their detail says where they are. Sources may read what
lies outside the recipe, so the summary holds a fingerprint of what was read: equal texts in equal order, equal digits.

A source of many files is read in parts, side by side (store/parts.py). What a killed run has completed of them stays.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.corpus import DocumentWriter, RowWriter, drop_writer, excerpt, keep_parts, part_writers, rows_of
from upweight.curate.normalise import DEFAULT_FILTERS, Filter, check, normalise
from upweight.curate.source import DAMAGED, Part, Reject, Source, listed, parts_of
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts

EXAMPLES_OF_REASON = 3
RECORDS_BEFORE_BOUND = 10_000
"""Records after which the bound on rejects is first looked at; before, a few bad ones in front would stop the run."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    sources: what is read, in order.
    filters: what is dropped at once; see curate/normalise.py.
    most_rejected_share: the largest share of records, and of files, that may be unreadable, 0-1; above it the run
        stops.
    """

    sources: tuple[Source, ...]
    filters: tuple[Filter, ...] = DEFAULT_FILTERS
    most_rejected_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("ingest has no sources: give at least one, for example JsonLines or PythonInstallation")
        if not 0 <= self.most_rejected_share <= 1:
            raise UserError(f"most_rejected_share is {self.most_rejected_share}: it is a share, 0-1")


@dataclass
class _Tally:
    """What came and what became of it, of one part or of all so far."""

    files: int = 0
    records: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    kept_bytes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def example(self, reason: str, **shown: str) -> None:
        shown_so_far = self.examples.setdefault(reason, [])
        if len(shown_so_far) < EXAMPLES_OF_REASON:
            shown_so_far.append(shown)

    def add(self, other: Mapping[str, Any]) -> None:
        """Another tally, as the JSON data that a part returns."""
        self.files += other["files"]
        for name in ("records", "kept", "kept_bytes", "rejected", "dropped"):
            getattr(self, name).update(other[name])
        for reason, examples in other["examples"].items():
            for shown in examples:
                self.example(reason, **shown)

    def refuse_above(self, most_share: float) -> None:
        """Refuse where more than this share of the records, or of the files, could not be read."""
        total, rejected = self.records.total(), self.rejected.total()
        if rejected > most_share * total:
            reason, count = self.rejected.most_common(1)[0]
            what = f"{rejected:,} of {total:,} records could not be read"
        elif self.rejected[DAMAGED] > most_share * self.files:
            reason = DAMAGED
            count = self.rejected[DAMAGED]
            what = f"{count:,} of {self.files:,} files could not be read to their end"
        else:
            return
        first = self.examples[reason][0]
        raise UserError(
            f"{what}, more than the allowed share of {most_share:g}; "
            f"{count:,} of them for the reason {reason!r}, the first at {first['detail']}: {first['excerpt']}. "
            "Mend the source, or raise most_rejected_share of ingest"
        )


def run(config: Config, work: Work) -> Summary:
    """Read all sources, part by part, and keep what can be read and passes the filters."""
    parts = [part for source in config.sources for part in parts_of(source)]
    keep_parts(work.out / "documents", len(parts))
    tally, digest, expected = _Tally(), hashlib.sha256(), _expected(config.sources)
    with (
        drop_writer(work.out / "dropped.parquet") as drops,
        work.monitor.track("read", total=expected, unit="documents") as bar,
    ):
        items = [(part, config.filters) for part in parts]
        for place, result in enumerate(in_parts(_read, items, work, bar, units=expected or math.inf)):
            tally.add(result["tally"])
            digest.update(result["digest"].encode())
            if tally.records.total() >= RECORDS_BEFORE_BOUND:
                tally.refuse_above(config.most_rejected_share)
            for row in rows_of(_dropped(work.out, place)):
                drops.add(*row)
        tally.refuse_above(config.most_rejected_share)
    if not tally.kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in (tally.rejected + tally.dropped).most_common(3))
        raise UserError(
            f"no document is left of {tally.records.total():,} records ({why or 'the sources are empty'}): "
            "give ingest other sources or wider filters"
        )
    forget(work.out)
    return _summary(tally, digest.hexdigest()[:16])


def _dropped(out: Path, place: int) -> Path:
    return out / DIRECTORY / f"{place:05d}.dropped.parquet"


def _read(item: tuple[Part, tuple[Filter, ...]], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Read one part: its documents and what is left out go to files, the counts are returned."""
    part, filters = item
    tally, digest = _Tally(files=part.files), hashlib.sha256()
    with part_writers(out / "documents", _dropped(out, place), place) as (writer, drops):
        for record in part.source.documents():
            tally.records[record.source] += 1
            if isinstance(record, Reject):
                tally.rejected[record.reason] += 1
                shown = excerpt(record.excerpt)
                tally.example(record.reason, source=record.source, detail=record.origin, excerpt=shown)
                drops.add("", record.source, record.reason, record.origin, shown)
            else:
                digest.update(f"{record.id} {record.source}\n".encode())
                _take(filters, record, writer, drops, tally)
            tick(1)
    return {"tally": vars(tally), "digest": digest.hexdigest()}


def _take(filters: Sequence[Filter], record: Document, writer: DocumentWriter, drops: RowWriter, tally: _Tally) -> None:
    text = normalise(record.text)
    document = record if text == record.text else Document.of(text, record.source)
    dropped = check(text, filters)
    if dropped is None:
        writer.add(document)
        tally.kept[document.source] += 1
        tally.kept_bytes[document.source] += len(text) if text.isascii() else len(text.encode())
    else:
        tally.dropped[dropped.reason] += 1
        shown = excerpt(text)
        tally.example(dropped.reason, source=document.source, detail=dropped.detail, excerpt=shown)
        drops.add(document.id, document.source, dropped.reason, dropped.detail, shown)


def _summary(tally: _Tally, fingerprint: str) -> dict[str, Any]:
    return {
        "records": tally.records.total(),
        "fingerprint": fingerprint,
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
    try:
        return float(sum(listed(source.paths).values())) if hasattr(source, "paths") else 0.0
    except UserError:
        return 0.0
