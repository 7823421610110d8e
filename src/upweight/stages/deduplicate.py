"""deduplicate: of equal and nearly equal documents the first stays, and what holds a problem of the evaluation goes.

Reads the documents twice, file by file and side by side: once for a key and a signature each, once to write what stays.
In between all are compared, with some 120 bytes a document in memory. Input `problems`, where given, is an artifact
with reserved_*.jsonl. Writes documents/*.parquet and dropped.parquet (id, source, reason, detail, excerpt).
"""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from jaxtyping import Bool, Int64, UInt32, UInt64

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.contamination import LEAST_SHARE, RUN_WORDS, Problems, spaced_words
from upweight.curate.corpus import (
    DOCUMENTS_AT_ONCE,
    batches,
    column_batches,
    document_files,
    documents_of,
    drop_writer,
    excerpt,
    keep_parts,
    part_writers,
    rows_of,
)
from upweight.curate.guarded import guarded
from upweight.curate.overlap import MinHash, clusters, estimated_similarity, exact_key, signatures_of
from upweight.store.artifact import write_whole
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts

RESERVED = "reserved_*.jsonl"
EXACT, NEAR, CONTAMINATED = "exact duplicate", "near duplicate", "contaminated"
EXAMPLES_OF_REASON = 5


@dataclass(frozen=True)
class Config:
    """Attributes:
    near: how near duplicates are found.
    problem_files: further files of problems, or patterns of them, that no document may hold: JSON lines, parquet or
        plain text (curate/guarded.py).
    run_words: decontamination compares runs of this many words.
    contaminated_share: a document that holds this share of a problem's runs is dropped, 0-1.
    """

    near: MinHash = field(default_factory=MinHash)
    problem_files: tuple[str, ...] = field(default=(), metadata=OUTSIDE)
    run_words: int = RUN_WORDS
    contaminated_share: float = LEAST_SHARE


class _Fate(NamedTuple):
    """Why one row of the documents is dropped."""

    reason: str
    detail: str


def run(config: Config, work: Work) -> Summary:
    """Drop duplicates and contaminated documents of input `documents`."""
    files = document_files(work.inputs["documents"])
    problems = _problem_files(config, work)
    guard = _guard(problems, config.run_words, config.contaminated_share) if problems else Problems([])
    documents = work.out / "documents"
    keep_parts(documents, len(files))
    rows = float(sum(parquet.read_metadata(file).num_rows for file in files))
    with work.monitor.track("compare", total=rows, unit="documents") as bar:
        items = [(file, config, problems) for file in files]
        looked = list(in_parts(_look, items, work, bar, "compare", units=rows))
    _decide(config, work, [part["rows"] for part in looked])
    kept: Counter[str] = Counter()
    kept_bytes: Counter[str] = Counter()
    dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    with (
        drop_writer(work.out / "dropped.parquet") as drops,
        work.monitor.track("write", total=rows, unit="documents") as bar,
    ):
        for place, part in enumerate(in_parts(_write, files, work, bar, "write", units=rows)):
            kept.update(part["kept"])
            kept_bytes.update(part["kept_bytes"])
            for identifier, source, reason, detail, shown in rows_of(_kept(work.out, place, "dropped.parquet")):
                drops.add(identifier, source, reason, detail, shown)
                dropped[reason][source] += 1
                if len(examples[reason]) < EXAMPLES_OF_REASON:
                    examples[reason].append({"id": identifier, "source": source, "detail": detail, "excerpt": shown})
    if not kept:
        raise UserError(
            f"no document is left of {rows:,.0f} in {work.inputs['documents']}: all hold problems of the evaluation"
        )
    forget(work.out)
    return _summary(int(rows), guard, kept, kept_bytes, dropped, examples)


def _problem_files(config: Config, work: Work) -> tuple[str, ...]:
    """The files of the problems that no document may hold."""
    paths = list(config.problem_files)
    if "problems" in work.inputs:
        reserved = sorted(work.inputs["problems"].glob(RESERVED))
        if not reserved:
            raise UserError(f"{work.inputs['problems']} holds no {RESERVED}: is input 'problems' the right artifact?")
        paths += map(str, reserved)
    return tuple(paths)


@lru_cache(maxsize=1)
def _guard(files: tuple[str, ...], words: int, share: float) -> Problems:
    """The problems, read once in each process."""
    return Problems(guarded(files), words=words, share=share)


def _kept(out: Path, place: int, what: str) -> Path:
    return out / DIRECTORY / f"{place:05d}.{what}"


def _look(item: tuple[Path, Config, tuple[str, ...]], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Compare the documents of one file with the problems; keep their ids, keys and signatures."""
    file, config, problems = item
    guard = _guard(problems, config.run_words, config.contaminated_share)
    ids: list[str] = []
    keys: list[bytes] = []
    contaminated: dict[int, str] = {}
    width = config.near.bands * config.near.rows
    with _kept(out, place, "signatures").open("wb") as signed:
        for batch in batches([file], DOCUMENTS_AT_ONCE):
            spaced = [spaced_words(document.text) for document in batch]
            split = [words.split() for words in spaced] if guard.ids else []
            guilty = {found.document_id: found for found in guard.find(batch, split)}
            for row, document in enumerate(batch, start=len(ids)):
                if (found := guilty.get(document.id)) is not None:
                    detail = f"{found.share:.2f} of problem {found.problem_id}: {excerpt(found.match)}"
                    contaminated[row] = detail
            ids += [document.id for document in batch]
            keys += [exact_key(document.text) for document in batch]
            signatures_of(spaced, config.near).tofile(signed)
            tick(len(batch))
    np.save(_kept(out, place, "ids.npy"), np.array([name.encode() for name in ids] or [b""]))
    np.save(_kept(out, place, "keys.npy"), np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2))
    _kept(out, place, "contaminated.json").write_text(json.dumps(contaminated))
    assert _kept(out, place, "signatures").stat().st_size == 4 * width * len(ids)
    return {"rows": len(ids)}


def _decide(config: Config, work: Work, counts: list[int]) -> None:
    """What happens to each row that does not stay, into a file for each part.

    In memory are numbers alone, some 120 bytes a document at most; ids, signatures and reasons stay on the disk.
    """
    out, starts = work.out, np.cumsum([0, *counts])
    firsts: list[int] = starts.tolist()
    stays = np.ones(firsts[-1], bool)
    for place, start in enumerate(firsts[:-1]):
        stays[[start + row for row in _contaminated(out, place)]] = False
    keys = np.concatenate([np.load(_kept(out, place, "keys.npy")) for place in range(len(counts))])
    original = _first_equal(keys, stays)
    del keys
    fresh = np.flatnonzero(stays & (original == np.arange(len(original))))
    near, similar = np.zeros(0, np.int64), np.zeros(0)
    if len(fresh):
        table = _signatures(config, out, counts, fresh)
        label = clusters(table, config.near)
        later = np.flatnonzero(label != np.arange(len(label)))
        near, similar = fresh[later], estimated_similarity(table, label[later], later)
        original[near] = fresh[label[later]]

    @lru_cache(maxsize=1_000)
    def ids_of(place: int) -> Any:
        return np.load(_kept(out, place, "ids.npy"), mmap_mode="r")

    def name_of(row: int) -> str:
        place = bisect_right(firsts, row) - 1
        return str(ids_of(place)[row - firsts[place]].decode())

    for place, start in enumerate(firsts[:-1]):
        fates = {row: _Fate(CONTAMINATED, detail) for row, detail in _contaminated(out, place).items()}
        mine = original[start : firsts[place + 1]]
        begin, end = np.searchsorted(near, (start, firsts[place + 1]))
        similarities = dict(zip(near[begin:end].tolist(), similar[begin:end].tolist(), strict=True))
        for row in (start + np.flatnonzero(mine != start + np.arange(len(mine)))).tolist():
            name = name_of(int(original[row]))
            fates[row - start] = (
                _Fate(NEAR, f"of {name}, estimated similarity {similarities[row]:.2f}")
                if row in similarities
                else _Fate(EXACT, f"of {name}")
            )
        write_whole(_kept(out, place, "fates.json"), json.dumps(fates))


def _contaminated(out: Path, place: int) -> dict[int, str]:
    """The rows of a part that hold a problem, and what they hold."""
    return {int(row): detail for row, detail in json.loads(_kept(out, place, "contaminated.json").read_text()).items()}


def _first_equal(
    keys: UInt64[np.ndarray, "document half"], stays: Bool[np.ndarray, " document"]
) -> Int64[np.ndarray, " document"]:
    """For each document the first among those that stay with the same key; itself for one that does not."""
    first = np.arange(len(keys))
    rows = np.flatnonzero(stays)
    order = rows[np.lexsort((rows, keys[rows, 1], keys[rows, 0]))]
    new = np.ones(len(order), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _signatures(
    config: Config, out: Path, counts: list[int], rows: Int64[np.ndarray, " document"]
) -> UInt32[np.ndarray, "document value"]:
    """The signatures of some rows, as one table on the disk."""
    width = config.near.bands * config.near.rows
    joined = out / DIRECTORY / "signatures"
    with joined.open("wb") as file:
        start = 0
        for place, count in enumerate(counts):
            mine = rows[(rows >= start) & (rows < start + count)] - start
            if len(mine):
                np.fromfile(_kept(out, place, "signatures"), np.uint32).reshape(-1, width)[mine].tofile(file)
            start += count
    return np.memmap(joined, np.uint32, "r", shape=(len(rows), width))


def _write(file: Path, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Write what stays of one file: the columns as they are, so that texts are not taken apart for it."""
    fates = {int(row): fate for row, fate in json.loads(_kept(out, place, "fates.json").read_text()).items()}
    kept: Counter[str] = Counter()
    kept_bytes: Counter[str] = Counter()
    first = 0
    with part_writers(out / "documents", _kept(out, place, "dropped.parquet"), place) as (writer, drops):
        for batch in column_batches([file]):
            left_out = [row for row in range(len(batch)) if first + row in fates]
            for row, document in zip(
                left_out, documents_of(batch.take(arrow.array(left_out, arrow.int64()))), strict=True
            ):
                drops.add(document.id, document.source, *fates[first + row], excerpt(document.text))
            stays = np.ones(len(batch), bool)
            stays[left_out] = False
            staying = batch.filter(arrow.array(stays))
            writer.add_columns(staying)
            lengths = np.asarray(compute.binary_length(staying.column("text")), np.int64)
            sources, owner = np.unique(np.array(staying.column("source").to_pylist(), str), return_inverse=True)
            for number, source in enumerate(sources.tolist()):
                kept[source] += int((owner == number).sum())
                kept_bytes[source] += int(lengths[owner == number].sum())
            first += len(batch)
            tick(len(batch))
    return {"kept": kept, "kept_bytes": kept_bytes}


def _summary(
    rows: int,
    guard: Problems,
    kept: Counter[str],
    kept_bytes: Counter[str],
    dropped: Mapping[str, Counter[str]],
    examples: Mapping[str, list[dict[str, str]]],
) -> dict[str, Any]:
    sources = sorted(set(kept).union(*dropped.values()))
    return {
        "documents": rows,
        "kept": kept.total(),
        "kept_bytes": kept_bytes.total(),
        "dropped": {reason: counts.total() for reason, counts in sorted(dropped.items())},
        "problems_compared": len(guard.ids) - guard.too_short,
        "problems_too_short": guard.too_short,
        "by_source": {
            source: {
                "kept": kept[source],
                "kept_bytes": kept_bytes[source],
                **{reason: counts[source] for reason, counts in sorted(dropped.items())},
            }
            for source in sources
        },
        "examples": dict(examples),
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """About 5 MB a second and core; some 120 bytes for each document of about 700 are held."""
    size = inputs["documents"].disk_bytes * 2
    return Estimate(
        tokens=size / 3, disk_bytes=size / 2 * 0.9, memory_bytes=3e8 + size / 700 * 120, seconds=2 + size / 5e6
    )
