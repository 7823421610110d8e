"""How fast documents are read, compared, tagged and searched, in CPU-seconds, in turns with a peer where there is one.

    python -m benchmarks.curation tagging decontamination search memory pipeline --write
    python -m benchmarks.curation datatrove --documents 2000 --write    # pip install datatrove spacy "xxhash<4"

`pipeline` sets the stages ingest and deduplicate against a script written by hand for daft: the same documents,
normalised, near duplicates by 20 bands of 6 values over word 5-grams, the same filter by length, written as parquet.
`datatrove` sets them against its readers, filters, deduplication and writers. All work in a process of their own with
one thread, the turns go round, and the ratio is taken round by round.
"""

import argparse
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.contest import Ratio, ratio
from benchmarks.table import Row, machine, put

WORDS_OF_TEXT = 150
"""About 1 KB."""
NEAR_SHARE, EXACT_SHARE = 0.08, 0.04
ROUNDS = 3
BANDS, BAND_VALUES = 20, 6
KEPT_BELOW = {"our_stages": "unique/documents", "by_datatrove": "kept"}
"""Where each pipeline leaves what it keeps; the others write nothing else."""
MORE_DOCUMENTS = 8
"""Memory is measured for so many times the documents as well."""
DOCUMENTS_OF_FILE = 100_000
QUERIES = 2_000
"""Of the search, asked together."""
SECTION = "## Curation on a CPU"


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of about 1 KB over 20,000 words of a Zipf distribution; some repeat earlier ones, whole or nearly."""
    random, numbers = Random(seed), np.random.default_rng(seed)
    vocabulary = ["".join(random.choices("aeioulnrstdmkp", k=random.randint(2, 9))) for _ in range(20_000)]
    words_drawn = np.array(vocabulary, object)[np.minimum(numbers.zipf(1.3, 1 << 20) - 1, len(vocabulary) - 1)]
    recent: list[list[str]] = []
    fresh: list[list[str]] = []
    for _ in range(count):
        drawn = random.random()
        if recent and drawn < NEAR_SHARE + EXACT_SHARE:
            words = list(random.choice(recent))
            if drawn < NEAR_SHARE:
                words[random.randrange(len(words))] = random.choice(vocabulary)
        else:
            if not fresh:  # some hundred together, of a million words drawn once: for speed
                fresh = words_drawn[numbers.integers(0, len(words_drawn), (256, WORDS_OF_TEXT))].tolist()
            words = fresh.pop()
            recent = [*recent[-200:], words]
        lines = [" ".join(words[at : at + 15]).capitalize() + "." for at in range(0, len(words), 15)]
        yield "\n".join(lines)


def spent(work: Callable[..., float], *arguments: Any) -> tuple[float, float, int]:
    """What `work` counts, the CPU-seconds of the process that did it and of its children, and its peak of memory."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_apart, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} ended without a word, exit code {process.exitcode}") from None
    process.join()
    return found  # type: ignore[no-any-return]


def _apart(connection: Any, work: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    prepare = getattr(work, "prepare", None)
    if prepare is not None:
        prepare()
    begin = _cpu()
    units = work(*arguments)
    connection.send((units, _cpu() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def tag_texts(count: int) -> float:
    """Documents that the default tagger scores."""
    from upweight.curate.tagger import Tagger

    tagger, chosen = Tagger.load(), list(texts(count, seed=1))
    tagger.score(chosen[:64])
    begin = _cpu()
    tagger.score(chosen)
    return count / (_cpu() - begin)


def compare_with_problems(count: int) -> float:
    """Microseconds of a document that is compared with 2,000 problems, its words split included."""
    from upweight.core.records import Document, Message, Problem
    from upweight.curate.contamination import Problems

    problems = [
        Problem(str(number), (Message("user", text[:400]),), None, (), "x")
        for number, text in enumerate(texts(2_000, seed=3))
    ]
    guard = Problems(problems)
    documents = [Document.of(text, "x") for text in texts(count, seed=2)]
    begin = _cpu()
    for start in range(0, count, 1_000):
        guard.find(documents[start : start + 1_000])
    return (_cpu() - begin) / count * 1e6


def search_vectors(rows: int, queries: int, width: int) -> tuple[float, float]:
    """Hybrid queries a CPU-second, batched, and the recall of the ten nearest vectors against brute force."""
    from upweight.core.records import Document
    from upweight.curate.embed import Embedder
    from upweight.curate.retrieval import Database, Embedded, Seed, brute_force

    random = np.random.default_rng(0)
    centres = random.normal(size=(256, width)).astype(np.float32)

    class Drawn(Embedder):
        """Vectors around centres, by the number that a text begins with."""

        def __init__(self) -> None:
            self.width = width
            noise = random.normal(size=(rows, width)).astype(np.float32)
            self.table = centres[np.arange(rows) % len(centres)] + noise
            self.table /= np.linalg.norm(self.table, axis=1, keepdims=True)

        def embed(self, texts: Any) -> Any:
            return self.table[[int(text.split(" ", 1)[0]) for text in texts]]

    embedder = Drawn()
    words = [f"w{number:04d}" for number in range(5_000)]
    draw = Random(0)

    def documents() -> Iterator[list[Document]]:
        for start in range(0, rows, 1_000):
            numbers = range(start, min(rows, start + 1_000))
            yield [Document(f"d{n:07d}", f"{n} {' '.join(draw.choices(words, k=30))}", "x") for n in numbers]

    with tempfile.TemporaryDirectory() as directory:
        database = Database(Path(directory), embedder)
        database.add(Embedded.by(embedder, batch) for batch in documents())
        asked = [Seed(f"{number * 7 % rows}", tuple(draw.choices(words, k=4))) for number in range(queries)]
        begin = _cpu()
        database.search(asked, hits=10)
        speed = queries / (_cpu() - begin)
        alone = [Seed(seed.text) for seed in asked[:100]]
        exact = brute_force(embedder.table, embedder.embed([seed.text for seed in alone]), 10)
        found = database.search(alone, hits=10)
        wanted = [{f"d{row:07d}" for row, _ in best} for best in exact]
        recall = np.mean(
            [len({hit.document_id for hit in hits} & best) / 10 for hits, best in zip(found, wanted, strict=True)]
        )
    return speed, float(recall)


def write_corpus(directory: Path, count: int, files: int = 4) -> str:
    """Texts in some parquet files; the pattern that names them."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    directory.mkdir(parents=True, exist_ok=True)
    made, schema = texts(count), arrow.schema([("text", arrow.string())])
    for number in range(files):
        left = count // files
        with parquet.ParquetWriter(directory / f"{number}.parquet", schema) as writer:
            while left:
                rows = [next(made) for _ in range(min(1_000, left))]
                writer.write_table(arrow.table({"text": rows}, schema))
                left -= len(rows)
    return str(directory / "*.parquet")


def our_stages(pattern: str, out: str, workers: int = 1) -> float:
    """Documents through ingest and deduplicate."""
    from upweight.core.work import Machine, Work
    from upweight.curate.normalise import Length
    from upweight.curate.readers import Parquet
    from upweight.stages import deduplicate, ingest

    first, second = Path(out) / "documents", Path(out) / "unique"
    for directory in (first, second):
        directory.mkdir(parents=True)
    on = Machine(workers=workers)
    config = ingest.Config((Parquet(pattern, "x"),), filters=(Length(),))
    summary = ingest.run(config, Work(first, {}, on))
    deduplicate.run(deduplicate.Config(), Work(second, {"documents": first}, on))
    return float(summary["records"])


def by_hand(pattern: str, out: str) -> float:
    """The same as a script for daft: its own functions throughout, and a union of the pairs that share a band."""
    import os

    os.environ["DO_NOT_TRACK"] = "1"
    import daft
    from daft import col

    read = daft.read_parquet(pattern)
    cleaned = col("text").normalize(nfd_unicode=False, white_space=False, lowercase=False, remove_punct=False)
    frame = read.with_column("text", cleaned.regexp_replace(r"[ \t]+(\n|$)", "$1"))
    frame = frame.where((col("text").length() >= 40) & (col("text").length() <= 200_000))
    lowered = col("text").normalize(lowercase=True, remove_punct=True, white_space=True)
    frame = frame.with_column("values", lowered.minhash(num_hashes=120, ngram_size=5, hash_function="xxhash"))
    table = frame.collect().to_arrow()
    values = np.asarray(table["values"].combine_chunks().flatten(), np.uint32).reshape(-1, 120)
    parent = list(range(len(values)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for band in range(20):
        rows = np.ascontiguousarray(values[:, band * 6 : band * 6 + 6]).view("V24").ravel()
        first: dict[bytes, int] = {}
        for place, key in enumerate(rows.tolist()):
            other = first.setdefault(key, place)
            if other != place and (values[other] == values[place]).mean() >= 0.8:
                a, b = sorted((root(other), root(place)))
                parent[b] = a
    kept = [place for place in range(len(values)) if root(place) == place]
    daft.from_arrow(table.select(["text"]).take(kept)).write_parquet(out)
    return float(read.count_rows())


def by_datatrove(pattern: str, out: str) -> float:
    """The same in datatrove, its four steps of deduplication one after the other; what shares a band is a duplicate."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature as Signature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    from upweight.curate.normalise import normalise

    def clean(documents: Any, rank: int = 0, world_size: int = 1) -> Any:
        for document in documents:
            document.text = normalise(document.text)  # it has no step of its own for this
            yield document

    work = Path(out)
    config = MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=BAND_VALUES)
    read = [
        ParquetReader(str(Path(pattern).parent), doc_progress=False),
        clean,
        LambdaFilter(lambda document: 40 <= len(document.text) <= 200_000),
    ]
    steps: list[tuple[int, list[Any]]] = [
        (1, [*read, Signature(str(work / "signatures"), config)]),
        (BANDS, [MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config)]),
        (1, [MinhashDedupCluster(str(work / "buckets"), str(work / "left_out"), config=config)]),
        (1, [*read, MinhashDedupFilter(str(work / "left_out")), ParquetWriter(str(work / "kept"))]),
    ]
    for number, (tasks, step) in enumerate(steps):
        LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=str(work / f"logs{number}")).run()
    return float(rows_below(Path(pattern).parent))


def rows_below(directory: Path) -> int:
    """Rows of all parquet files below a directory."""
    import pyarrow.parquet as parquet

    return sum(parquet.read_metadata(file).num_rows for file in directory.rglob("*.parquet"))


def written(count: int, directory: str, files: int) -> float:
    """Writes a corpus, apart from what is measured."""
    write_corpus(Path(directory), count, files)
    return float(count)


def bounded_stages(pattern: str, out: str, most_bytes: int) -> float:
    """The most memory of its own that a process holds in our stages, in bytes; 0 lets it have any amount.

    Files that are only mapped do not count: the system takes their pages back where it needs them.
    """
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peak = max(peak, held * 1024)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        our_stages(pattern, out)
    finally:
        ended.set()
        watching.join()
    return float(peak)


PIPELINES: Mapping[str, Mapping[str, Callable[..., float]]] = {
    "pipeline": {"daft, a script by hand": by_hand},
    "datatrove": {"datatrove": by_datatrove},
}


def pipeline(name: str, count: int, rounds: int) -> list[tuple[str, str, Ratio]]:
    """Rows: peer, figures, ratio."""
    peers: Mapping[str, Callable[..., float]] = {"upweight": our_stages, **PIPELINES[name]}
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    kept: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        pattern = write_corpus(Path(directory) / "corpus", count)
        for number in range(rounds):
            for name, work in peers.items():
                out = Path(directory) / f"{work.__name__}{number}"
                units, seconds, _ = spent(work, pattern, str(out))
                speeds[name].append(units / seconds)
                kept[name] = rows_below(out / KEPT_BELOW.get(work.__name__, ""))
                print(f"round {number + 1}, {name}: {units / seconds:,.0f} documents a CPU-second", file=sys.stderr)
    mine = speeds.pop("upweight")
    return [
        (
            peer,
            f"{sorted(mine)[rounds // 2]:,.0f} against {sorted(theirs)[rounds // 2]:,.0f} documents a CPU-second; "
            f"{kept['upweight']:,} and {kept[peer]:,} clusters",
            ratio(mine, theirs),
        )
        for peer, theirs in speeds.items()
    ]


def rows_of(name: str, chosen: argparse.Namespace) -> list[tuple[str, str, str, Ratio]]:
    """Rows: work, peer, figures, ratio."""
    if name == "tagging":
        speeds = [spent(tag_texts, chosen.documents)[0] for _ in range(chosen.rounds)]
        figures = f"{sorted(speeds)[len(speeds) // 2]:,.0f} documents a CPU-second"
        work = "tagging documents of 1 KB on 20 dimensions"
        return [(work, "goal of 2,000", figures, ratio(speeds, [2_000.0] * len(speeds)))]
    if name == "decontamination":
        spans = [spent(compare_with_problems, chosen.documents)[0] for _ in range(chosen.rounds)]
        figures = f"{sorted(spans)[len(spans) // 2]:.0f} microseconds a document of 1 KB, 2,000 problems"
        return [("decontamination", "goal of 100 microseconds", figures, ratio([100.0] * len(spans), spans))]
    if name == "search":
        speed, recall = search_vectors(chosen.vectors, QUERIES, 384)
        work = f"hybrid search, {chosen.vectors:,} documents x 384"
        figures = f"{speed:,.0f} of {QUERIES:,} queries a CPU-second, recall@10 of the vectors {recall:.3f}"
        return [(work, "goal of 500 queries a CPU-second", figures, ratio([speed], [500.0]))]
    if name == "memory":
        counts, peaks, figures = (chosen.documents, MORE_DOCUMENTS * chosen.documents), [], []
        for count in counts:
            with tempfile.TemporaryDirectory() as directory:
                corpus = Path(directory) / "corpus"
                spent(written, count, str(corpus), max(4, count // DOCUMENTS_OF_FILE))
                size = sum(file.stat().st_size for file in corpus.iterdir()) / 1e9
                most = int(chosen.limit_mb * 1e6)
                peak, seconds, _ = spent(bounded_stages, str(corpus / "*.parquet"), str(Path(directory) / "out"), most)
            peaks.append(peak)
            figures.append(f"{peak / 1e6:,.0f} MB for {count:,} documents")
            print(f"{figures[-1]}, parquet of {size:.2f} GB, {seconds:,.0f} CPU-seconds", file=sys.stderr)
        told = " and ".join(figures) + (f", within {chosen.limit_mb:,} MB of its own" if chosen.limit_mb else "")
        peer = f"{MORE_DOCUMENTS} times the documents"
        return [("memory of ingest and deduplicate", peer, told, ratio([peaks[1]], [peaks[0]]))]
    work = f"{chosen.documents:,} documents of 1 KB: read parquet, normalise, near duplicates, filter, write"
    return [(work, *row) for row in pipeline(name, chosen.documents, chosen.rounds)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+", choices=["tagging", "decontamination", "search", "memory", *PIPELINES])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--limit-mb", type=int, default=0, help="of memory: what the process may hold of its own")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    chosen = parser.parse_args()
    for name in chosen.work:
        size = f"--vectors {chosen.vectors}" if name == "search" else f"--documents {chosen.documents}"
        command = f"python -m benchmarks.curation {name} {size} --rounds {chosen.rounds}"
        command += f" --limit-mb {chosen.limit_mb}" if name == "memory" and chosen.limit_mb else ""
        made = [
            Row(work, peer, figures, found, command, machine(), "one thread")
            for work, peer, figures, found in rows_of(name, chosen)
        ]
        for row in made:
            print(row.line())
        if chosen.write:
            put(made, Path(__file__).parents[1] / "docs" / "benchmarks.md", SECTION)


if __name__ == "__main__":
    main()
