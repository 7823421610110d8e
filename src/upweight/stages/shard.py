"""shard: train the tokenizer on the curated documents and write them as token shards, one for each named pool.

A pool is what mixtures are made of: the documents of some tiers and some sources. Each document goes to the first pool
that takes it, so pools are disjoint and tokens are counted once. A share of the documents, chosen by the hash of their
id, is held out of every pool: bits per byte are measured on it.

Texts become tokens part by part and side by side (store/parts.py), which is nearly all of the work; then the parts are
joined in their order. What a killed run has completed stays, the tokenizer too.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.selection import matches
from upweight.store.jsonl import write_jsonl
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts, one_of_several
from upweight.store.shards import ShardWriter
from upweight.text.chat import PLAIN
from upweight.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer"
DOCUMENTS_AT_ONCE = 2_000
DOCUMENTS_OF_PART = 20_000

BYTES_A_TOKEN_AND_BIT = 0.24
"""Bytes of text that a token stands for, by the bits of its id, for the plan: 2.4 of 1,024 tokens, 3.8 of 49,152."""


@dataclass(frozen=True)
class Pool:
    """Documents whose tier is named and whose source matches one of the patterns ("story-*")."""

    tiers: tuple[str, ...]
    sources: tuple[str, ...] = ("*",)

    def takes(self, tier: str, source: str) -> bool:
        """Whether a document of this tier and source belongs here."""
        return tier in self.tiers and matches(source, self.sources)


@dataclass(frozen=True)
class Config:
    """Attributes:
    pools: named pools, tried in order; a document that none takes is left out and counted.
    vocabulary: entries of the byte-level BPE, the special tokens included.
    tokenizer_bytes: how much text the tokenizer is trained on, sampled evenly over the pools' documents.
    tokenizer: a directory or hub name of a tokenizer to use instead of training one.
    control_sources: patterns of sources whose texts may hold control tokens ("<|im_start|>"). Elsewhere these are
        plain characters, so that no document can forge the end of another.
    heldout_share: the share of documents held out for bits per byte, 0-1.
    heldout_most: documents kept of those held out, a pool.
    """

    pools: Mapping[str, Pool] = field(default_factory=lambda: {"high": Pool(("high",)), "medium": Pool(("medium",))})
    vocabulary: int = 1024
    tokenizer_bytes: int = 4_000_000
    tokenizer: str | None = None
    control_sources: tuple[str, ...] = ()
    heldout_share: float = 0.01
    heldout_most: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"heldout_share is {self.heldout_share}: it is a share in [0, 1)")
        if not self.pools:
            raise UserError("shard has no pools: name at least one, {'high': Pool(tiers=('high',))}")


def run(config: Config, work: Work) -> Summary:
    """Write `tokenizer/`, `shards/<pool>/`, `heldout.jsonl` and `pools.json`."""
    files = sorted((work.inputs["documents"] / "documents").glob("*.parquet"))
    if not files:
        raise UserError(f"{work.inputs['documents']} holds no documents/*.parquet: run mix before shard")
    trained = (tuple(files), config, work.seed)
    with work.monitor.track("tokenizer", total=1, unit="tokenizers") as bar:
        (made,) = in_parts(_make_tokenizer, [trained], work, bar, "tokenizer", units=1)
    parts = _parts(files)
    rows = sum(part.rows for part in parts)
    with work.monitor.track("tokenize", total=rows, unit="documents") as bar:
        items = [(part, config, str(made["fingerprint"])) for part in parts]
        encoded = in_parts(_encode, items, work, bar, "tokenize", units=rows)
        counts, heldout, not_kept, left_out = _join(parts, encoded, Tokenizer.load(work.out / TOKENIZER), config, work)
    forget(work.out)
    write_jsonl(work.out / "heldout.jsonl", (document for pool in config.pools for document in heldout[pool]))
    (work.out / "pools.json").write_text(json.dumps(counts, indent=1))
    return {
        "vocabulary": made["vocabulary"],
        "pools": counts,
        "bytes_per_token": {
            pool: round(sum(c["bytes"] for c in by.values()) / max(1, sum(c["tokens"] for c in by.values())), 3)
            for pool, by in counts.items()
        },
        "tokens": sum(count["tokens"] for by in counts.values() for count in by.values()),
        "heldout_documents": {pool: len(kept) for pool, kept in heldout.items()},
        "heldout_not_kept": dict(not_kept),
        "documents_in_no_pool": dict(left_out),
    }


@dataclass(frozen=True)
class _Part:
    """Some row groups of one file of documents."""

    file: Path
    groups: tuple[int, ...]
    rows: int


def _parts(files: Sequence[Path]) -> list[_Part]:
    """All documents in their order, in parts of about DOCUMENTS_OF_PART."""
    parts: list[_Part] = []
    for file in files:
        about = parquet.read_metadata(file)
        groups: list[int] = []
        rows = 0
        for group in range(about.num_row_groups):
            groups.append(group)
            rows += about.row_group(group).num_rows
            if rows >= DOCUMENTS_OF_PART or group == about.num_row_groups - 1:
                parts.append(_Part(file, tuple(groups), rows))
                groups, rows = [], 0
    return parts


_Row = tuple[str, str, str, str]
"""Id, text, source and tier."""


def _rows(part: _Part) -> Iterator[_Row]:
    columns = ["id", "text", "source", "tier"]
    file = parquet.ParquetFile(part.file)
    for batch in file.iter_batches(batch_size=DOCUMENTS_AT_ONCE, row_groups=list(part.groups), columns=columns):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _pool_of(config: Config, tier: str, source: str) -> str | None:
    return next((name for name, pool in config.pools.items() if pool.takes(tier, source)), None)


def _is_heldout(document_id: str, share: float) -> bool:
    draw = int.from_bytes(hashlib.sha256(f"heldout {document_id}".encode()).digest()[:8], "big")
    return draw < share * 2**64


def _goes_to(config: Config, row: _Row) -> str | None:
    """The pool whose shards a document goes to; None for one that is held out or that no pool takes."""
    identifier, _, source, tier = row
    return None if _is_heldout(identifier, config.heldout_share) else _pool_of(config, tier, source)


def _make_tokenizer(item: tuple[tuple[Path, ...], Config, int], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Train the tokenizer, or take the one that is named, and save it."""
    files, config, seed = item
    if config.tokenizer is None:
        tokenizer = Tokenizer.train(_sample(files, config, Random(seed)), config.vocabulary)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.with_template(PLAIN).save(out / TOKENIZER)
    tick(1)
    digest = hashlib.sha256((out / TOKENIZER / "tokenizer.json").read_bytes()).hexdigest()
    return {"vocabulary": tokenizer.vocab_size, "fingerprint": digest[:16]}


def _sample(files: Sequence[Path], config: Config, random: Random) -> Iterator[str]:
    """Texts to train the tokenizer on: each document with the probability that makes the wanted bytes."""
    parts = _parts(files)
    total = sum(len(row[1]) for part in parts for row in _rows(part) if _pool_of(config, row[3], row[2]))
    keep = min(1.0, config.tokenizer_bytes / max(1, total))
    for part in parts:
        for _, text, source, tier in _rows(part):
            if _pool_of(config, tier, source) and random.random() < keep:
                yield text


@lru_cache(maxsize=1)
def _tokenizer(directory: Path, fingerprint: str) -> Tokenizer:
    """Read once in each process."""
    if one_of_several():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one of several workers
    return Tokenizer.load(directory)


def _tokens(out: Path, place: int) -> Path:
    return out / DIRECTORY / f"{place:05d}.tokens"


def _encode(item: tuple[_Part, Config, str], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """The tokens of each document of a part that goes to a pool, one after the other; of the others there are none.

    Control tokens are known in the texts of `control_sources` only.
    """
    part, config, fingerprint = item
    tokenizer = _tokenizer(out / TOKENIZER, fingerprint)
    lengths: list[int] = []
    rows = _rows(part)
    with _tokens(out, place).open("wb") as file:
        while batch := list(islice(rows, DOCUMENTS_AT_ONCE)):
            encoded: list[list[int]] = [[] for _ in batch]
            for control in (False, True):
                places = [
                    number
                    for number, row in enumerate(batch)
                    if _goes_to(config, row) and matches(row[2], config.control_sources) == control
                ]
                made = tokenizer.encode_many([batch[number][1] for number in places], control=control)
                for number, tokens in zip(places, made, strict=True):
                    encoded[number] = tokens
            np.array([token for tokens in encoded for token in tokens], np.uint32).tofile(file)
            lengths += map(len, encoded)
            tick(len(batch))
    return {"lengths": lengths}


def _join(
    parts: Sequence[_Part],
    encoded: Iterator[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: Config,
    work: Work,
) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, list[Document]], Counter[str], Counter[str]]:
    """Write the shards, part after part as they are complete."""
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in config.pools}
    heldout: dict[str, list[Document]] = {name: [] for name in config.pools}
    not_kept: Counter[str] = Counter()  # held out beyond `heldout_most`
    left_out: Counter[str] = Counter()
    writers = {name: ShardWriter(work.out / "shards" / name, vocab_size=tokenizer.vocab_size) for name in config.pools}
    for place, (part, done) in enumerate(zip(parts, encoded, strict=True)):
        tokens, start = np.fromfile(_tokens(work.out, place), np.uint32), 0
        for row, length in zip(_rows(part), done["lengths"], strict=True):
            identifier, text, source, tier = row
            pool = _pool_of(config, tier, source)
            if pool is None:
                left_out[f"{tier}/{source}"] += 1
            elif _goes_to(config, row) is None:
                if len(heldout[pool]) < config.heldout_most:
                    heldout[pool].append(Document(identifier, text, source))
                else:
                    not_kept[pool] += 1
            else:
                ids = [*tokens[start : start + length].tolist(), tokenizer.end_of_text]
                writers[pool].write(ids, source=source, document_id=identifier, tier=tier)
                count = counts[pool].setdefault(source, {"documents": 0, "tokens": 0, "bytes": 0})
                count["documents"] += 1
                count["tokens"] += length + 1
                count["bytes"] += len(text.encode())
                start += length
    for name, writer in writers.items():
        if not counts[name]:
            raise UserError(
                f"pool {name!r} is empty: no document has a tier in {config.pools[name].tiers} and a source like "
                f"{config.pools[name].sources}. Widen the pool, or add documents of that kind to ingest"
            )
        writer.close()
    return counts, heldout, not_kept, left_out


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Tokenizing reads about 2.5 MB of text a second and core, twice what the documents take on disk; a token is longer
    where the vocabulary is larger, and takes two or four bytes."""
    size = 2 * inputs["documents"].disk_bytes
    tokens = size / (BYTES_A_TOKEN_AND_BIT * math.log2(config.vocabulary))
    return Estimate(
        tokens=tokens,
        disk_bytes=tokens * (2 if config.vocabulary <= 2**16 else 4),
        seconds=5 + size / 2.5e6,
        memory_bytes=5e8 + 2 * size,
        vocabulary=config.vocabulary,
    )
