"""shard: train the tokenizer on the curated documents and write them as token shards, one for each named pool.

A pool is what mixtures are made of: the documents of some tiers and some sources. Each document goes to the first pool
that takes it, so pools are disjoint and tokens are counted once. A share of the documents, chosen by the hash of their
id, is held out of every pool: bits per byte are measured on it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from random import Random

import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Estimate, Summary, Work
from upweight.store.jsonl import write_jsonl
from upweight.store.shards import ShardWriter
from upweight.text.chat import PLAIN
from upweight.text.tokenizer import Tokenizer

DOCUMENTS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Pool:
    """Documents whose tier is named and whose source matches one of the patterns ("story-*")."""

    tiers: tuple[str, ...]
    sources: tuple[str, ...] = ("*",)

    def takes(self, tier: str, source: str) -> bool:
        """Whether a document of this tier and source belongs here."""
        return tier in self.tiers and any(fnmatch(source, pattern) for pattern in self.sources)


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
    if config.tokenizer is None:
        tokenizer = Tokenizer.train(_sample(files, config, Random(work.seed)), config.vocabulary)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.with_template(PLAIN).save(work.out / "tokenizer")
    counts, heldout, not_kept, left_out = _write(files, tokenizer, config, work)
    write_jsonl(work.out / "heldout.jsonl", (document for pool in config.pools for document in heldout[pool]))
    (work.out / "pools.json").write_text(json.dumps(counts, indent=1))
    return {
        "vocabulary": tokenizer.vocab_size,
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


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    columns = ["id", "text", "source", "tier"]
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=DOCUMENTS_AT_ONCE, columns=columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _pool_of(config: Config, tier: str, source: str) -> str | None:
    return next((name for name, pool in config.pools.items() if pool.takes(tier, source)), None)


def _is_heldout(document_id: str, share: float) -> bool:
    draw = int.from_bytes(hashlib.sha256(f"heldout {document_id}".encode()).digest()[:8], "big")
    return draw < share * 2**64


def _sample(files: Sequence[Path], config: Config, random: Random) -> Iterator[str]:
    """Texts to train the tokenizer on: each document with the probability that makes the wanted bytes."""
    total = sum(len(text) for _, text, source, tier in _rows(files) if _pool_of(config, tier, source))
    keep = min(1.0, config.tokenizer_bytes / max(1, total))
    for _, text, source, tier in _rows(files):
        if _pool_of(config, tier, source) and random.random() < keep:
            yield text


def _encode(tokenizer: Tokenizer, batch: Sequence[tuple[str, str, str, str]], config: Config) -> list[list[int]]:
    """The tokens of each document; control tokens are known in those of `control_sources` only."""
    encoded: list[list[int]] = [[] for _ in batch]
    for control in (False, True):
        places = [
            place
            for place, (_, _, source, _) in enumerate(batch)
            if any(fnmatch(source, pattern) for pattern in config.control_sources) == control
        ]
        for place, tokens in zip(
            places, tokenizer.encode_many([batch[place][1] for place in places], control=control), strict=True
        ):
            encoded[place] = tokens
    return encoded


def _write(
    files: Sequence[Path], tokenizer: Tokenizer, config: Config, work: Work
) -> tuple[dict[str, dict[str, dict[str, int]]], dict[str, list[Document]], Counter[str], Counter[str]]:
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in config.pools}
    heldout: dict[str, list[Document]] = {name: [] for name in config.pools}
    not_kept: Counter[str] = Counter()  # held out beyond `heldout_most`
    left_out: Counter[str] = Counter()
    writers = {name: ShardWriter(work.out / "shards" / name, vocab_size=tokenizer.vocab_size) for name in config.pools}
    total = sum(parquet.ParquetFile(file).metadata.num_rows for file in files)
    rows = _rows(files)
    with work.monitor.track("shard", total=total, unit="documents") as bar:
        while batch := list(islice(rows, DOCUMENTS_AT_ONCE)):
            encoded = _encode(tokenizer, batch, config)
            for (identifier, text, source, tier), tokens in zip(batch, encoded, strict=True):
                pool = _pool_of(config, tier, source)
                if pool is None:
                    left_out[f"{tier}/{source}"] += 1
                elif _is_heldout(identifier, config.heldout_share):
                    if len(heldout[pool]) < config.heldout_most:
                        heldout[pool].append(Document(identifier, text, source))
                    else:
                        not_kept[pool] += 1
                else:
                    writers[pool].write(
                        [*tokens, tokenizer.end_of_text], source=source, document_id=identifier, tier=tier
                    )
                    count = counts[pool].setdefault(source, {"documents": 0, "tokens": 0, "bytes": 0})
                    count["documents"] += 1
                    count["tokens"] += len(tokens) + 1
                    count["bytes"] += len(text.encode())
            bar.advance(len(batch))
    for name, writer in writers.items():
        if not counts[name]:
            raise UserError(
                f"pool {name!r} is empty: no document has a tier in {config.pools[name].tiers} and a source like "
                f"{config.pools[name].sources}. Widen the pool, or add documents of that kind to ingest"
            )
        writer.close()
    return counts, heldout, not_kept, left_out


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Tokens at about three bytes each; tokenizing reads about 2 MB a second and core."""
    size = inputs["documents"].disk_bytes
    return Estimate(
        tokens=size / 3, disk_bytes=size, seconds=size / 2e6, memory_bytes=5e8, vocabulary=config.vocabulary
    )
