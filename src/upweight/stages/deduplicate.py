"""deduplicate: of equal and nearly equal documents the first stays, and what holds a problem of the evaluation goes.

Reads the documents twice: once for a key and a signature each (some 500 bytes a document are held), once to write what
stays. Input `problems`, where given, is an artifact with reserved_*.jsonl. Writes documents/*.parquet and
dropped.parquet (id, source, reason, detail, excerpt).
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from upweight.core.errors import UserError
from upweight.core.records import Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.contamination import LEAST_SHARE, RUN_WORDS, Problems
from upweight.curate.corpus import DOCUMENTS_AT_ONCE, DocumentWriter, batches, document_files, drop_writer, excerpt
from upweight.curate.overlap import MinHash, clusters, estimated_similarity, exact_key, signatures
from upweight.store.jsonl import read_jsonl

RESERVED = "reserved_*.jsonl"
EXACT, NEAR, CONTAMINATED = "exact duplicate", "near duplicate", "contaminated"
EXAMPLES_OF_REASON = 5


@dataclass(frozen=True)
class Config:
    """Attributes:
    near: how near duplicates are found.
    problem_files: further files of problems (one core Problem a line) that no document may hold.
    run_words: decontamination compares runs of this many words.
    contaminated_share: a document that holds this share of a problem's runs is dropped, 0-1.
    """

    near: MinHash = field(default_factory=MinHash)
    problem_files: tuple[str, ...] = ()
    run_words: int = RUN_WORDS
    contaminated_share: float = LEAST_SHARE


class _Fate(NamedTuple):
    """Why one row of the documents is dropped."""

    reason: str
    detail: str


def run(config: Config, work: Work) -> Summary:
    """Drop duplicates and contaminated documents of input `documents`."""
    files = document_files(work.inputs["documents"])
    problems = _problems(config, work)
    fates, rows = _fates(config, work, files, problems)
    shutil.rmtree(work.out / "documents", ignore_errors=True)  # of an earlier run that was killed
    kept: Counter[str] = Counter()
    kept_bytes: Counter[str] = Counter()
    dropped: defaultdict[str, Counter[str]] = defaultdict(Counter)
    examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    row = 0
    with (
        DocumentWriter(work.out / "documents") as writer,
        drop_writer(work.out / "dropped.parquet") as drops,
        work.monitor.track("write", total=float(rows), unit="documents") as bar,
    ):
        for batch in batches(files):
            for document in batch:
                fate = fates.get(row)
                row += 1
                if fate is None:
                    writer.add(document)
                    kept[document.source] += 1
                    kept_bytes[document.source] += len(document.text.encode())
                    continue
                shown = excerpt(document.text)
                drops.add(document.id, document.source, fate.reason, fate.detail, shown)
                dropped[fate.reason][document.source] += 1
                if len(examples[fate.reason]) < EXAMPLES_OF_REASON:
                    example = {"id": document.id, "source": document.source, "detail": fate.detail, "excerpt": shown}
                    examples[fate.reason].append(example)
            bar.advance(float(len(batch)))
    if not kept:
        raise UserError(
            f"no document is left of {rows:,} in {work.inputs['documents']}: all hold problems of the evaluation"
        )
    return _summary(rows, len(problems), kept, kept_bytes, dropped, examples)


def _problems(config: Config, work: Work) -> list[Problem]:
    """The problems that no document may hold."""
    paths = [Path(name) for name in config.problem_files]
    if "problems" in work.inputs:
        reserved = sorted(work.inputs["problems"].glob(RESERVED))
        if not reserved:
            raise UserError(f"{work.inputs['problems']} holds no {RESERVED}: is input 'problems' the right artifact?")
        paths += reserved
    return [problem for path in paths for problem in read_jsonl(path, Problem)]


def _fates(config: Config, work: Work, files: list[Path], problems: list[Problem]) -> tuple[dict[int, _Fate], int]:
    """What happens to the rows that do not stay, and how many rows there are."""
    guard = Problems(problems, words=config.run_words, share=config.contaminated_share)
    fates: dict[int, _Fate] = {}
    first_with: dict[bytes, str] = {}
    ids: list[str] = []
    signed_rows: list[int] = []
    signed = []
    with work.monitor.track("compare", total=0.0, unit="documents") as bar:
        for batch in batches(files, DOCUMENTS_AT_ONCE):
            base = len(ids)
            ids += [document.id for document in batch]
            guilty = {found.document_id: found for found in guard.find(batch)}
            fresh = []
            for row, document in enumerate(batch, start=base):
                key = exact_key(document.text)
                if document.id in guilty:
                    found = guilty[document.id]
                    detail = f"{found.share:.2f} of problem {found.problem_id}: {excerpt(found.match)}"
                    fates[row] = _Fate(CONTAMINATED, detail)
                elif (same := first_with.get(key)) is not None:
                    fates[row] = _Fate(EXACT, f"of {same}")
                else:
                    first_with[key] = document.id
                    signed_rows.append(row)
                    fresh.append(document.text)
            signed.append(signatures(fresh, config.near))
            bar.advance(float(len(batch)))
    if signed_rows:
        table = np.concatenate(signed)
        label = clusters(table, config.near)
        later = np.flatnonzero(label != np.arange(len(label)))
        similar = estimated_similarity(table, label[later], later)
        for place, similarity in zip(later.tolist(), similar.tolist(), strict=True):
            first = ids[signed_rows[int(label[place])]]
            fates[signed_rows[place]] = _Fate(NEAR, f"of {first}, estimated similarity {similarity:.2f}")
    return fates, len(ids)


def _summary(
    rows: int,
    problems: int,
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
        "problems_compared": problems,
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
    """About 5 MB a second and core; a signature of 4 bytes a value is held for each document of about 700 bytes."""
    size = inputs["documents"].disk_bytes * 2
    signature_bytes = size / 700 * config.near.bands * config.near.rows * 4
    return Estimate(
        tokens=size / 3, disk_bytes=size / 2 * 0.9, memory_bytes=3e8 + 2 * signature_bytes, seconds=2 + size / 5e6
    )
