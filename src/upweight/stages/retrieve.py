"""retrieve: how close each document is to the best ones, by hybrid search with seeds as queries.

Writes similarity.parquet (document_id, similarity 0-1, 0 where no seed hit it; its cluster where these are asked for)
and hits.jsonl (what some seeds found).

Vectors are made file by file and side by side (store/parts.py), and those that a killed run has made stay. The database
is built of them in one go.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
from jaxtyping import Int64

from upweight.core.errors import UserError
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.clusters import Clusters
from upweight.curate.corpus import Listing, batches, document_files, excerpt, listing
from upweight.curate.embed import Embedder, HashedEmbedder, SentenceEmbedder
from upweight.curate.endpoint_embedder import EndpointEmbedder
from upweight.curate.retrieval import KEY_WORDS, SEEDS_AT_ONCE, Database, Embedded, Hit, Seed, closest
from upweight.curate.scores import Scores
from upweight.curate.seeds import SeedFile, SeedRule, chosen_rows
from upweight.curate.served_retrieval import ServedDatabase
from upweight.store.artifact import write_whole
from upweight.store.jsonl import iterate_jsonl, write_jsonl
from upweight.store.parts import DIRECTORY, Tick, forget, in_parts, one_of_several

HASHED = "hashed"
DATABASE, ELSEWHERE = "database", "database.uri"
SEEDS_SHOWN = 20
HITS_SHOWN = 5


@dataclass(frozen=True)
class Config:
    """Attributes:
    seeds: rules that choose documents of the corpus, and files of texts; all of them together are the queries.
    hits: documents that one seed hits.
    embedder: "hashed", the name of a sentence-transformers model, or "http://host/v1#model" for a server's.
    dimensions: of the hashed embedder's vectors.
    counted_documents: on how many documents, spread evenly, the rarity of words is measured.
    database: where documents and vectors are put and searched for: "" for below the artifact, exactly; a LanceDB server
        or its files in object storage ("db://name#table", "s3://bucket/path"), see curate/served_retrieval.py.
    keep_database: leave the database, to be searched later; where it lies elsewhere, database.uri says where.
    clusters: groups of documents that are alike, for tiers that bound the share of each (curate/clusters.py); 0 for
        none.
    """

    seeds: tuple[SeedRule | SeedFile, ...] = (SeedRule(),)
    hits: int = 50
    embedder: str = HASHED
    dimensions: int = 256
    counted_documents: int = 10_000
    database: str = ""
    keep_database: bool = False
    clusters: int = 0

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("retrieve has no seeds: give a SeedRule or a SeedFile")
        if min(self.hits, self.dimensions, self.counted_documents, self.clusters + 1) < 1:
            raise UserError("retrieve: hits, dimensions and counted_documents are counts of 1 or more, clusters of 0")


def run(config: Config, work: Work) -> Summary:
    """Search the documents of input `documents` with seeds chosen by the scores of input `tags`."""
    files = document_files(work.inputs["documents"])
    listed = listing(files)
    words = HashedEmbedder(config.dimensions, work.seed)
    words.count(_spread(files, len(listed.ids), config.counted_documents))
    (work.out / DIRECTORY).mkdir(exist_ok=True)
    words.save_counts(_counts(work.out))
    learnt = words.fingerprint() if config.embedder == HASHED else ""
    setting = _Setting(config.embedder, config.dimensions, work.seed, learnt, work.machine.device)
    embedder = _embedder(setting, work.out)
    database = _database(config, work.out, embedder)
    total = float(len(listed.ids))
    with work.monitor.track("embed", total=total, unit="documents") as bar:
        items = [(file, setting) for file in files]
        device = work.machine.device if isinstance(embedder, SentenceEmbedder) else "cpu"
        for _ in in_parts(_embed, items, work, bar, "embed", units=total, device=device):
            pass
    with work.monitor.track("store", total=total, unit="documents") as bar:

        def stored() -> Iterator[Embedded]:
            for batch in _embedded(files, work.out):
                yield batch
                bar.advance(float(len(batch.documents)))

        database.add(stored())
    clusters: list[Int64[np.ndarray, " _"]] = []
    if config.clusters:
        sample = embedder.embed(list(_spread(files, len(listed.ids), config.counted_documents)))
        found_clusters = Clusters.fit(sample, config.clusters, work.seed)
        clusters = [found_clusters.of(batch.vectors) for batch in _embedded(files, work.out)]
    chosen = _seeds(config, work, files, listed)
    seeds = [Seed(seed.text, tuple(words.key_words(seed.text, KEY_WORDS))) for seed in chosen]
    found: list[list[Hit]] = []
    with work.monitor.track("search", total=float(len(seeds)), unit="seeds") as bar:
        for start in range(0, len(seeds), SEEDS_AT_ONCE):
            found += database.search(seeds[start : start + SEEDS_AT_ONCE], hits=config.hits)
            bar.advance(float(len(found) - start))
    if not config.keep_database:
        _remove(database, work.out)
    forget(work.out)
    similarity = closest(found)
    _write_similarity(work.out / "similarity.parquet", listed, similarity, clusters)
    shown = _shown(chosen, found, files, listed)
    write_jsonl(work.out / "hits.jsonl", shown)
    return {
        "documents": len(listed.ids),
        "seeds": len(seeds),
        "seeds_by_source": dict(Counter(seed.source for seed in chosen).most_common()),
        "documents_hit": len(similarity),
        "mean_similarity_of_hits": round(float(np.mean(list(similarity.values()))) if similarity else 0.0, 4),
        "hit_share_by_source": _hit_shares(listed, similarity),
        "examples": shown[:3],
    }


def _database(config: Config, out: Path, embedder: Embedder) -> Database | ServedDatabase:
    """An empty one, without what an earlier run that was killed has left of its own."""
    if not config.database:
        shutil.rmtree(out / DATABASE, ignore_errors=True)
        return Database(out / DATABASE, embedder)
    served = ServedDatabase(config.database, embedder)
    if served.exists and not (out / ELSEWHERE).exists():
        raise UserError(
            f"retrieve would put its documents into {config.database}, and there is such a table already: name another "
            'one behind a "#", or drop that one'
        )
    served.drop()
    write_whole(out / ELSEWHERE, config.database)
    return served


def _remove(database: Database | ServedDatabase, out: Path) -> None:
    if isinstance(database, ServedDatabase):
        database.drop()
        (out / ELSEWHERE).unlink()
    else:
        shutil.rmtree(out / DATABASE)


class _Setting(NamedTuple):
    """What makes an embedder; `learnt` is the fingerprint of the frequencies of words."""

    name: str
    dimensions: int
    seed: int
    learnt: str
    device: str


@lru_cache(maxsize=1)
def _embedder(setting: _Setting, out: Path) -> Embedder:
    """Made once in each process."""
    if setting.name == HASHED:
        words = HashedEmbedder(setting.dimensions, setting.seed)
        words.load_counts(_counts(out))
        return words
    if setting.name.startswith(("http://", "https://")):
        url, _, model = setting.name.partition("#")
        return EndpointEmbedder(url, model)
    return SentenceEmbedder(setting.name, setting.device)


def _counts(out: Path) -> Path:
    return out / DIRECTORY / "counts.npz"


def _vectors(out: Path, place: int) -> Path:
    return out / DIRECTORY / f"{place:05d}.vectors"


def _embed(item: tuple[Path, _Setting], place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Write the vectors of the documents of one file, one after the other."""
    file, setting = item
    if one_of_several():
        torch.set_num_threads(1)  # one of several workers
    embedder = _embedder(setting, out)
    with _vectors(out, place).open("wb") as vectors:
        for batch in batches([file]):
            embedder.embed([document.text for document in batch]).tofile(vectors)
            tick(len(batch))
    return {"width": embedder.width}


def _embedded(files: list[Path], out: Path) -> Iterator[Embedded]:
    """All documents with the vectors that were made of them, a batch at a time."""
    for place, file in enumerate(files):
        rows = parquet.read_metadata(file).num_rows
        if not rows:
            continue
        vectors = np.memmap(_vectors(out, place), np.float32, "r").reshape(rows, -1)
        start = 0
        for batch in batches([file]):
            yield Embedded(batch, np.asarray(vectors[start : start + len(batch)]))
            start += len(batch)


def _spread(files: list[Path], total: int, most: int) -> Iterator[str]:
    """Every n-th text, about `most` in all."""
    step = -(-total // most)
    documents = (document for batch in batches(files) for document in batch)
    return (document.text for place, document in enumerate(documents) if place % step == 0)


class _Chosen(NamedTuple):
    """A seed: its source or the name of its file, its id or the number of its line, its text."""

    source: str
    name: str
    text: str


def _seeds(config: Config, work: Work, files: list[Path], listed: Listing) -> list[_Chosen]:
    """The seeds without repeats: documents in the order of the rules, then those of files."""
    rows: list[int] = []
    from_files: dict[str, list[_Chosen]] = {}
    scores: Scores | None = None
    for rule in config.seeds:
        if isinstance(rule, SeedFile):
            from_files[rule.path] = _texts_of(rule)
        else:
            scores = scores or Scores.read(work.inputs["tags"] / "tags.parquet", listed.ids)
            rows += chosen_rows(rule, listed.ids, listed.sources, scores)
    rows = list(dict.fromkeys(rows))
    texts = _texts_at(files, listed, rows)
    documents = [_Chosen(listed.sources[row], listed.ids[row], texts[row]) for row in rows]
    return documents + [seed for seeds in from_files.values() for seed in seeds]


def _texts_of(file: SeedFile) -> list[_Chosen]:
    seeds = []
    for number, record in enumerate(iterate_jsonl(Path(file.path), dict), start=1):
        if not isinstance(record.get("text"), str):
            raise UserError(f'{file.path}, record {number} has no "text": a file of seeds holds one text a line')
        seeds.append(_Chosen(Path(file.path).name, str(number), record["text"]))
    return seeds


def _texts_at(files: list[Path], listed: Listing, rows: list[int]) -> dict[int, str]:
    wanted = {listed.ids[row]: row for row in rows}
    return {
        wanted[document.id]: document.text for batch in batches(files) for document in batch if document.id in wanted
    }


def _write_similarity(
    path: Path, listed: Listing, similarity: Mapping[str, float], clusters: list[Int64[np.ndarray, " _"]]
) -> None:
    values = np.fromiter((similarity.get(name, 0.0) for name in listed.ids), np.float32, len(listed.ids))
    table = arrow.table({"document_id": arrow.array(listed.ids, arrow.string()), "similarity": values})
    if clusters:
        table = table.append_column("cluster", arrow.array(np.concatenate(clusters), arrow.int32()))
    building = path.with_name(f".{path.name}.building")
    parquet.write_table(table, building)
    building.replace(path)


def _shown(seeds: list[_Chosen], found: list[list[Hit]], files: list[Path], listed: Listing) -> list[dict[str, object]]:
    """What some seeds, spread evenly, found, with excerpts; a seed that found itself leaves itself out."""
    step = max(1, len(seeds) // SEEDS_SHOWN)
    chosen = list(range(0, len(seeds), step))[:SEEDS_SHOWN]
    hits = {seed: [hit for hit in found[seed] if hit.document_id != seeds[seed].name][:HITS_SHOWN] for seed in chosen}
    wanted = {hit.document_id for seed in chosen for hit in hits[seed]}
    places = {name: row for row, name in enumerate(listed.ids) if name in wanted}
    found_texts = _texts_at(files, listed, [places[hit.document_id] for seed in chosen for hit in hits[seed]])
    return [
        {
            "seed": f"{seeds[seed].source} {seeds[seed].name}",
            "excerpt": excerpt(seeds[seed].text),
            "hits": [
                {
                    "document_id": hit.document_id,
                    "source": listed.sources[places[hit.document_id]],
                    "similarity": round(hit.cosine, 4),
                    "excerpt": excerpt(found_texts[places[hit.document_id]]),
                }
                for hit in hits[seed]
            ],
        }
        for seed in chosen
    ]


def _hit_shares(listed: Listing, similarity: Mapping[str, float]) -> dict[str, float]:
    total = Counter(listed.sources)
    hit = Counter(source for name, source in zip(listed.ids, listed.sources, strict=True) if name in similarity)
    return {source: round(hit[source] / total[source], 4) for source in sorted(total)}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """About 2 MB a second and core to embed, index and search; the database holds text and vectors."""
    size = inputs["documents"].disk_bytes
    database = 2 * size + size / 1000 * config.dimensions * 4
    disk_bytes = size / 50 + (database if config.keep_database and not config.database else 0)
    return Estimate(tokens=size / 3, disk_bytes=disk_bytes, seconds=5 + size / 2e6, memory_bytes=1e9)
