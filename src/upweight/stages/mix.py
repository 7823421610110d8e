"""mix: utilities, tiers and the ledger. The best documents go to the first tier, and nothing vanishes uncounted.

Writes documents/<tier>-<part>.parquet (id, text, source, tier, utility), dropped.parquet (id, source, utility, reason,
excerpt) and ledger.json: documents and bytes that came in, stayed and went to each tier, by source, reconciled exactly.

What goes where is decided for all documents together; they are written input file by input file and side by side
(store/parts.py), and what a killed run has completed of them stays.
"""

import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.corpus import (
    Listing,
    RowWriter,
    batches,
    document_files,
    excerpt,
    listing,
    rows_of,
)
from upweight.curate.proxy import learn
from upweight.curate.scores import Scores, read_clusters, read_similarity
from upweight.curate.selection import DEFAULT_WEIGHTS, Lift, Placed, Tier, place, ranked, utilities
from upweight.store.artifact import write_whole
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts

DROPPED = "dropped"
SAMPLES = 12

KEPT_SCHEMA = arrow.schema(
    [(name, arrow.string()) for name in ("id", "text", "source", "tier")] + [("utility", arrow.float32())]
)
DROPPED_SCHEMA = arrow.schema(
    [
        ("id", arrow.string()),
        ("source", arrow.string()),
        ("utility", arrow.float32()),
        ("reason", arrow.string()),
        ("excerpt", arrow.string()),
    ]
)

DEFAULT_FLOORS: Mapping[str, int] = {
    "factual_reliability": 3,
    "non_repetition": 2,
    "safety": 4,
    "character_integrity": 4,
}
"""What no other quality makes up for: wrong, repeated, harmful or garbled text."""

Amounts = dict[str, dict[str, int]]
"""Documents and bytes by source."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    tiers: best first; a document goes to the first that has room for it.
    weights: of the quality dimensions in the utility, by name.
    weights_by_source: other weights for the sources that a pattern matches ("math-*"), one at most.
    proxy: a file of what a proxy measured of some documents, JSON lines with id and value, higher for more useful: the
        weights are learnt from it, and `weights` is what is believed before (curate/proxy.py).
    floors: the least score of each named dimension; a document below one is dropped, whatever its utility.
    lift: how far similarity may raise a document.
    """

    tiers: tuple[Tier, ...] = (Tier("high", share=0.4, min_utility=0.5), Tier("medium", min_utility=0.35))
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    weights_by_source: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    proxy: str | None = field(default=None, metadata=OUTSIDE)
    floors: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_FLOORS))
    lift: Lift = field(default_factory=Lift)

    def __post_init__(self) -> None:
        if DROPPED in (tier.name for tier in self.tiers):
            raise UserError(f"a tier cannot be called {DROPPED!r}: the ledger uses the name")


def run(config: Config, work: Work) -> Summary:
    """Place the documents of input `documents` by the inputs `tags` and `similarity`."""
    files = document_files(work.inputs["documents"])
    listed = listing(files)
    scores = Scores.read(work.inputs["tags"] / "tags.parquet", listed.ids)
    similarity = read_similarity(work.inputs["similarity"] / "similarity.parquet", listed.ids)
    weights: Mapping[str, float] = config.weights
    learnt: dict[str, Any] = {}
    if config.proxy is not None:
        weights, figures = learn(Path(config.proxy), listed.ids, scores, config.weights, work.seed)
        learnt = {"learnt_weights": {"weights": dict(weights), **figures}}
    utility = utilities(
        scores,
        similarity,
        listed.sources,
        weights=weights,
        weights_by_source=config.weights_by_source,
        lift=config.lift,
    )
    below = np.flatnonzero(~scores.reach(config.floors)).tolist()
    refused = {row: sys.intern(scores.missed(row, config.floors)) for row in below}
    values = array("d", utility.tobytes())
    bounded = any(tier.cluster_share < 1 for tier in config.tiers)
    clusters = read_clusters(work.inputs["similarity"] / "similarity.parquet", listed.ids) if bounded else None
    placed = place(listed.ids, listed.sources, listed.byte_counts, values, config.tiers, refused, clusters)
    ledger = _ledger(config, listed, placed)
    written = _write(config, work, files, placed, values)
    _reconcile(ledger, written)
    building = work.out / ".ledger.json.building"
    building.write_text(json.dumps(ledger, indent=1, sort_keys=True))
    building.replace(work.out / "ledger.json")
    return {
        **{name: _total(ledger[name]) for name in ("raw", "kept", DROPPED)},
        "tiers": {tier.name: _total(ledger["tiers"][tier.name]) for tier in config.tiers},
        "kept_share_by_source": {
            source: round(ledger["kept"].get(source, {"bytes": 0})["bytes"] / max(1, amount["bytes"]), 4)
            for source, amount in sorted(ledger["raw"].items())
        },
        "reasons": dict(Counter(reason for tier, reason in placed if tier is None).most_common(20)),
        **learnt,
        "utility": {f"{share:.2f}": round(float(np.quantile(utility, share)), 4) for share in (0, 0.25, 0.5, 0.75, 1)},
        "ledger": ledger,
        "samples": _samples(config, files, listed, placed, values, similarity.tolist()),
    }


def _ledger(config: Config, listed: Listing, placed: list[Placed]) -> dict[str, Any]:
    """Counted from what was listed and placed; _write counts again from what is written."""
    tiers: dict[str, Amounts] = {tier.name: {} for tier in config.tiers}
    ledger: dict[str, Any] = {"raw": {}, "kept": {}, DROPPED: {}, "tiers": tiers}
    for source, size, (tier, _) in zip(listed.sources, listed.byte_counts, placed, strict=True):
        _count(ledger["raw"], source, size)
        if tier is None:
            _count(ledger[DROPPED], source, size)
        else:
            _count(ledger["kept"], source, size)
            _count(tiers[tier], source, size)
    return ledger


def _count(amounts: Amounts, source: str, size: int) -> None:
    amount = amounts.setdefault(source, {"documents": 0, "bytes": 0})
    amount["documents"] += 1
    amount["bytes"] += size


def _total(amounts: Amounts) -> dict[str, int]:
    return {unit: sum(amount[unit] for amount in amounts.values()) for unit in ("documents", "bytes")}


def _reconcile(ledger: Mapping[str, Any], written: Mapping[str, Amounts]) -> None:
    """Every byte that came in was written to one tier or dropped, by source; anything else is a defect of ours."""
    tiers = {name: amounts for name, amounts in written.items() if name != DROPPED}
    if tiers != ledger["tiers"] or written[DROPPED] != ledger[DROPPED]:
        raise AssertionError(f"the ledger {ledger} does not match what was written, {written}")
    summed: Amounts = {}
    for amounts in written.values():
        for source, amount in amounts.items():
            earlier = summed.get(source, {"documents": 0, "bytes": 0})
            summed[source] = {unit: earlier[unit] + amount[unit] for unit in amount}
    if summed != ledger["raw"]:
        raise AssertionError(f"what was written, {summed}, is not what came in, {ledger['raw']}")


def _write(
    config: Config, work: Work, files: list[Path], placed: list[Placed], utility: "array[float]"
) -> dict[str, Amounts]:
    """Write the texts, input file by input file and side by side: a file for each tier, and what is dropped."""
    names = [*(tier.name for tier in config.tiers), DROPPED]
    (work.out / DIRECTORY).mkdir(exist_ok=True)
    start = 0
    for place_of_file, file in enumerate(files):
        stop = start + parquet.read_metadata(file).num_rows
        fates = {"placed": placed[start:stop], "utility": utility[start:stop].tolist()}
        write_whole(_kept(work.out, place_of_file, "fates.json"), json.dumps(fates))
        start = stop
    documents = work.out / "documents"
    documents.mkdir(exist_ok=True)
    expected = {_documents(work.out, name, number) for name in names for number in range(len(files))}
    for left in set(documents.iterdir()) - expected:  # by an earlier run that was killed
        left.unlink()
    written: dict[str, Amounts] = {name: {} for name in names}
    with (
        RowWriter(work.out / f"{DROPPED}.parquet", DROPPED_SCHEMA) as drops,
        work.monitor.track("mix", total=float(len(placed)), unit="documents") as bar,
    ):
        items = [(file, tuple(names)) for file in files]
        for number, part in enumerate(in_parts(_write_part, items, work, bar, "write", units=float(len(placed)))):
            for name, amounts in part["written"].items():
                for source, amount in amounts.items():
                    summed = written[name].setdefault(source, {"documents": 0, "bytes": 0})
                    for unit in summed:
                        summed[unit] += amount[unit]
            for row in rows_of(_kept(work.out, number, f"{DROPPED}.parquet")):
                drops.add(*row)
    forget(work.out)
    return written


def _kept(out: Path, place_of_file: int, what: str) -> Path:
    return out / DIRECTORY / f"{place_of_file:05d}.{what}"


def _documents(out: Path, tier: str, number: int) -> Path:
    return out / "documents" / f"{tier}-{number:05d}.parquet"


def _write_part(item: tuple[Path, tuple[str, ...]], number: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Write the documents of one file to a file for each tier, and what is dropped of it."""
    file, names = item
    fates = json.loads(_kept(out, number, "fates.json").read_text())
    written: dict[str, Amounts] = {name: {} for name in names}
    row = 0
    with ExitStack() as stack:
        drops = stack.enter_context(RowWriter(_kept(out, number, f"{DROPPED}.parquet"), DROPPED_SCHEMA))
        writers = {
            name: stack.enter_context(RowWriter(_documents(out, name, number), KEPT_SCHEMA))
            for name in names
            if name in {tier for tier, _ in fates["placed"]}
        }
        for batch in batches([file]):
            for document in batch:
                (tier, reason), utility = fates["placed"][row], fates["utility"][row]
                if tier is None:
                    drops.add(document.id, document.source, utility, reason, excerpt(document.text))
                else:
                    writers[tier].add(document.id, document.text, document.source, tier, utility)
                _count(written[tier or DROPPED], document.source, len(document.text.encode()))
                row += 1
            tick(len(batch))
    return {"written": written}


def _samples(
    config: Config,
    files: list[Path],
    listed: Listing,
    placed: list[Placed],
    utility: "array[float]",
    similarity: list[float],
) -> dict[str, list[dict[str, object]]]:
    """A few documents of each tier and of the dropped, spread evenly from the best to the worst."""
    order = ranked(utility, listed.ids)
    chosen: dict[str, list[int]] = {}
    for name in [*(tier.name for tier in config.tiers), DROPPED]:
        rows = order[[(placed[row].tier or DROPPED) == name for row in order]].tolist()
        chosen[name] = list(_spread(rows))
    wanted = {listed.ids[row] for rows in chosen.values() for row in rows}
    texts = {document.id: document.text for batch in batches(files) for document in batch if document.id in wanted}
    return {
        name: [
            {
                "id": listed.ids[row],
                "source": listed.sources[row],
                "utility": round(utility[row], 4),
                "similarity": round(similarity[row], 4),
                "reason": placed[row].reason,
                "excerpt": excerpt(texts[listed.ids[row]]),
            }
            for row in rows
        ]
        for name, rows in chosen.items()
    }


def _spread(rows: list[int]) -> Iterator[int]:
    for place_in_sample in range(min(SAMPLES, len(rows))):
        yield rows[place_in_sample * (len(rows) - 1) // max(1, min(SAMPLES, len(rows)) - 1)]


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """The texts are read three times and written once, at about 10 MB a second together."""
    size = inputs["documents"].disk_bytes
    return Estimate(tokens=size / 3, disk_bytes=size, seconds=1 + size / 1e7, memory_bytes=5e8)
