"""Every stage of curation on a Ray cluster of two workers, one of which is killed in each pass over the documents."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from tests.unit.stages import killed_parts

from upweight.app.find import find_module
from upweight.core.work import Machine, Work
from upweight.curate.readers import JsonLines
from upweight.curate.seeds import SeedRule
from upweight.curate.selection import Tier
from upweight.stages import deduplicate, ingest, mix, retrieve, shard, tag
from upweight.synthesize.stories import StoryDocuments

ray = pytest.importorskip("ray")

PASSES: tuple[tuple[ModuleType, str], ...] = (
    (ingest, "_read"),
    (deduplicate, "_look"),
    (deduplicate, "_write"),
    (tag, "_tag"),
    (retrieve, "_embed"),
    (mix, "_write_part"),
    (shard, "_encode"),
)


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def _line(root: Path, machine: Machine) -> dict[str, bytes]:
    """Raw documents to token shards; what is on the disk at the end."""

    def step(name: str, **inputs: str) -> Work:
        (root / name).mkdir(parents=True)
        return Work(root / name, {key: root / directory for key, directory in inputs.items()}, machine, seed=3)

    sources = tuple(StoryDocuments(60, seed=seed, damaged_share=0.3) for seed in (0, 1, 0, 2))
    ingest.run(ingest.Config(sources), step("documents"))
    deduplicate.run(deduplicate.Config(), step("unique", documents="documents"))
    tag.run(tag.Config(), step("tags", documents="unique"))
    seeds = retrieve.Config(seeds=(SeedRule(count=10, source_share=1.0),), hits=10, clusters=4)
    retrieve.run(seeds, step("similarity", documents="unique", tags="tags"))
    tiers = mix.Config((Tier("high", share=0.3, cluster_share=0.9), Tier("medium", share=0.3)), floors={})
    mix.run(tiers, step("mixture", documents="unique", tags="tags", similarity="similarity"))
    shard.run(shard.Config(vocabulary=300), step("shards", documents="mixture"))
    files = (file for file in root.rglob("*") if file.is_file() and not file.name.endswith(killed_parts.KILLED))
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(files)}


@pytest.mark.timeout(900)  # each worker that is killed has to import everything again
def test_killed_workers_lose_and_double_nothing(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _line(tmp_path / "here", Machine(workers=1))
    for stage, name in PASSES:
        monkeypatch.setattr(stage, name, partial(killed_parts.killed_once, stage.__name__, name))
    there = _line(tmp_path / "there", Machine(workers=2, cluster="local"))
    marks = {path.name for path in (tmp_path / "there").glob(f"*-{killed_parts.KILLED}")}
    steps = ("documents", "unique", "unique", "tags", "similarity", "mixture", "shards")
    assert marks == {f"{step}{name}-killed" for step, (_, name) in zip(steps, PASSES, strict=True)}
    assert sorted(here) == sorted(there)
    assert [name for name in here if here[name] != there[name]] == []
    assert {"similarity/similarity.parquet", "mixture/ledger.json", "shards/shards/high/tokens.bin"} <= set(here)


OWN = """
from upweight.curate.normalise import Dropped, Filter

class Odd(Filter):
    def check(self, text):
        return Dropped("odd", "told by a filter of a recipe's own file") if len(text) % 2 else None
"""


def test_relative_paths_and_classes_of_a_recipe_reach_the_workers(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipes" / "filter_of_ones_own.py"
    corpus = tmp_path / "here" / "corpus"
    for directory in (recipe.parent, corpus, tmp_path / "out"):
        directory.mkdir(parents=True)
    recipe.write_text(OWN)
    for number in range(4):
        (corpus / f"{number}.jsonl").write_text(json.dumps({"text": "a" * number}))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(corpus.parent)  # the cluster was started elsewhere
    filters = (find_module(str(recipe)).Odd(),)
    sources = tuple(JsonLines(f"corpus/{number}.jsonl", "x") for number in range(4))
    work = Work(tmp_path / "out", {}, Machine(cluster="local"))
    summary = ingest.run(ingest.Config(sources, filters=filters, most_rejected_share=1.0), work)
    assert (summary["kept"], summary["dropped"], summary["rejected"]) == (1, {"odd": 2}, {"empty": 1})
