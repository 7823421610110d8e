import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.work import Estimate, Work
from upweight.curate.seeds import SeedFile, SeedRule
from upweight.curate.served_retrieval import ServedDatabase
from upweight.stages import retrieve
from upweight.store.parts import Tick
from upweight.synthesize.stories import StoryDocuments

COUNT = 400


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stories in two files; worked ones are tagged 8 throughout, damaged ones 2. The tags are in another order."""
    root = tmp_path_factory.mktemp("inputs")
    documents = list(StoryDocuments(COUNT, seed=1).documents())
    (root / "documents").mkdir()
    for number, part in enumerate((documents[:150], documents[150:])):
        rows = [{"id": d.id, "text": d.text, "source": d.source} for d in part]
        parquet.write_table(arrow.Table.from_pylist(rows), root / "documents" / f"{number}.parquet")
    tags = [{"document_id": d.id, "scores": [8 if d.source == "story-worked" else 2] * 20} for d in documents[::-1]]
    schema = arrow.schema([("document_id", arrow.string()), ("scores", arrow.list_(arrow.uint8()))])
    parquet.write_table(arrow.Table.from_pylist(tags, schema=schema), root / "tags.parquet")
    return {"documents": root, "tags": root}


def test_every_document_has_a_similarity_and_two_runs_agree(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = retrieve.Config(seeds=(SeedRule(("story-worked",), count=20, source_share=1.0),), hits=10)
    outs = [tmp_path / name for name in ("first", "second")]
    for out in outs:
        out.mkdir()
        (out / "database").mkdir()
        (out / "database" / "left-by-a-killed-run").write_text("x")
        summary = retrieve.run(config, Work(out, inputs, seed=5))
    assert outs[0].joinpath("similarity.parquet").read_bytes() == outs[1].joinpath("similarity.parquet").read_bytes()
    assert outs[0].joinpath("hits.jsonl").read_bytes() == outs[1].joinpath("hits.jsonl").read_bytes()
    assert sorted(path.name for path in outs[0].iterdir()) == ["hits.jsonl", "similarity.parquet"]
    rows = parquet.read_table(outs[0] / "similarity.parquet").to_pylist()
    assert len(rows) == COUNT
    assert all(0 <= row["similarity"] <= 1 for row in rows)
    # Each of 20 seeds hits at most 10, itself with cosine 1.
    assert 20 <= sum(row["similarity"] > 0 for row in rows) <= 200
    assert sum(row["similarity"] > 0.9999 for row in rows) >= 20
    assert summary["documents"] == COUNT
    assert summary["seeds_by_source"] == {"story-worked": 20}
    json.dumps(summary)
    shown = [json.loads(line) for line in (outs[0] / "hits.jsonl").read_text().splitlines()]
    assert len(shown) == 20
    assert all(hit["document_id"] not in seed["seed"] for seed in shown for hit in seed["hits"])


def test_a_killed_run_goes_on_with_the_files_that_are_left(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = retrieve.Config(seeds=(SeedRule(count=5),), hits=5, clusters=3)
    embed, made = retrieve._embed, []

    def stopped(item: Any, place: int, out: Path, tick: Tick) -> dict[str, Any]:
        made.append(place)
        if len(made) == 2:
            raise KeyboardInterrupt
        return embed(item, place, out, tick)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out in (whole, resumed):
        out.mkdir()
    retrieve.run(config, Work(whole, inputs, seed=5))
    monkeypatch.setattr(retrieve, "_embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        retrieve.run(config, Work(resumed, inputs, seed=5))
    retrieve.run(config, Work(resumed, inputs, seed=5))
    assert made == [0, 1, 1]
    for name in ("similarity.parquet", "hits.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == ["hits.jsonl", "similarity.parquet"]


def test_clusters_are_told_where_they_are_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = retrieve.Config(seeds=(SeedRule(count=3),), hits=5, clusters=4)
    retrieve.run(config, Work(tmp_path, inputs, seed=5))
    rows = parquet.read_table(tmp_path / "similarity.parquet").to_pylist()
    assert len(rows) == COUNT
    assert {row["cluster"] for row in rows} == {0, 1, 2, 3}


def test_seeds_from_a_file_need_no_tags(inputs: dict[str, Path], tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"text": "Mia has 14 pens. She buys 23 more."}\n')
    out = tmp_path / "out"
    out.mkdir()
    config = retrieve.Config(seeds=(SeedFile(str(seeds)),), hits=5, keep_database=True)
    summary = retrieve.run(config, Work(out, {"documents": inputs["documents"]}))
    assert summary["seeds_by_source"] == {"seeds.jsonl": 1}
    assert 0 < summary["documents_hit"] <= 5
    assert (out / "database").is_dir()
    seeds.write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match='no "text"'):
        retrieve.run(config, Work(out, {"documents": inputs["documents"]}))


def test_seed_files_of_one_name_are_all_read_and_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    texts = {"one": "Mia has 14 pens. She buys 23 more.", "two": "A train travels 60 miles in 2 hours."}
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my seeds.jsonl").write_text(json.dumps({"text": text}))
    out = tmp_path / "out"
    out.mkdir()
    config = retrieve.Config(seeds=tuple(SeedFile(str(tmp_path / folder / "my seeds.jsonl")) for folder in texts))
    summary = retrieve.run(config, Work(out, {"documents": inputs["documents"]}))
    assert summary["seeds_by_source"] == {"my seeds.jsonl": 2}
    shown = [json.loads(line)["excerpt"] for line in (out / "hits.jsonl").read_text().splitlines()]
    assert shown == list(texts.values())


def test_a_database_elsewhere_gives_the_same_and_spoils_nobodys_table(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"file://{tmp_path}/lance#stories"
    table = tmp_path / "lance" / "stories.lance"
    seeds = (SeedRule(("story-worked",), count=5, source_share=1.0),)

    def done(name: str, **more: Any) -> dict[str, float]:
        (tmp_path / name).mkdir(exist_ok=True)
        retrieve.run(retrieve.Config(seeds=seeds, hits=10, **more), Work(tmp_path / name, inputs, seed=5))
        rows = parquet.read_table(tmp_path / name / "similarity.parquet").to_pylist()
        return {row["document_id"]: row["similarity"] for row in rows}

    here = done("here")
    with monkeypatch.context() as killed:
        killed.setattr(ServedDatabase, "search", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            done("elsewhere", database=uri)
    assert table.exists()
    with pytest.raises(UserError, match="there is such a table already"):
        done("another", database=uri)
    assert done("elsewhere", database=uri) == pytest.approx(here, abs=1e-5)  # the table is its own
    assert not table.exists()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["hits.jsonl", "similarity.parquet"]
    assert done("kept", database=uri, keep_database=True) == pytest.approx(here, abs=1e-5)
    assert table.exists()
    assert (tmp_path / "kept" / "database.uri").read_text() == uri


def test_wrong_inputs_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"documents/\*\.parquet"):
        retrieve.run(retrieve.Config(), Work(tmp_path, {"documents": tmp_path, "tags": tmp_path}))
    table = parquet.read_table(inputs["tags"] / "tags.parquet").slice(1)
    parquet.write_table(table, tmp_path / "tags.parquet")
    with pytest.raises(UserError, match="run tag on the same documents"):
        retrieve.run(retrieve.Config(), Work(tmp_path, {**inputs, "tags": tmp_path}))


def test_the_estimate_grows_with_the_corpus() -> None:
    estimates = [
        retrieve.estimate(retrieve.Config(), {"documents": Estimate(disk_bytes=size), "tags": Estimate()})
        for size in (1e6, 1e9)
    ]
    assert estimates[0].seconds < estimates[1].seconds
