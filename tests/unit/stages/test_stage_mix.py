import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.work import Machine, Work
from upweight.curate.selection import Lift, Tier
from upweight.stages import mix
from upweight.store.parts import Tick

# (id, text, source, score of every dimension, similarity); "é" is two bytes.
ROWS = [
    ("a", "aaaa", "book", 9, 0.0),
    ("b", "bbé", "book", 8, 0.0),
    ("c", "cccc", "web", 7, 1.0),
    ("d", "dddd", "web", 4, 0.0),
    ("e", "eeee", "spam", 1, 1.0),
]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    root = tmp_path / "inputs"
    (root / "documents").mkdir(parents=True)
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        rows = [{"id": row[0], "text": row[1], "source": row[2]} for row in part]
        parquet.write_table(arrow.Table.from_pylist(rows), root / "documents" / f"{number}.parquet")
    schema = arrow.schema([("document_id", arrow.string()), ("scores", arrow.list_(arrow.uint8()))])
    tags = [{"document_id": row[0], "scores": [row[3]] * 20} for row in reversed(ROWS)]
    parquet.write_table(arrow.Table.from_pylist(tags, schema=schema), root / "tags.parquet")
    similarity = [{"document_id": row[0], "similarity": row[4]} for row in ROWS]
    parquet.write_table(arrow.Table.from_pylist(similarity), root / "similarity.parquet")
    return dict.fromkeys(("documents", "tags", "similarity"), root)


CONFIG = mix.Config(
    tiers=(Tier("high", max_bytes=8, min_utility=0.6), Tier("medium", min_utility=0.4)),
    weights={"coherence": 1.0},
    floors={"safety": 2},
    lift=Lift(0.2, floors={}),
)


def test_a_tier_that_bounds_clusters_needs_them(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = mix.Config(tiers=(Tier("high", cluster_share=0.5),))
    with pytest.raises(UserError, match="set clusters of retrieve"):
        mix.run(config, Work(tmp_path, inputs))
    table = parquet.read_table(inputs["similarity"] / "similarity.parquet")
    table = table.append_column("cluster", arrow.array([1, 1, 1, 2, 2], arrow.int32()))
    parquet.write_table(table, inputs["similarity"] / "similarity.parquet")
    summary = mix.run(config, Work(tmp_path, inputs))
    # 20 bytes came in, so cluster 1 may fill 10: c (lifted) and a (8), not b; d is of cluster 2, and e is refused
    assert summary["tiers"]["high"]["documents"] == 3
    assert summary["reasons"]["cluster fills its share of tier high"] == 1


def test_tiers_dropped_and_ledger(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    summary = mix.run(CONFIG, Work(out, inputs))
    # Utilities: a 9/9 = 1, b 8/9 = 0.89, c 7/9 + 0.2 = 0.98, d 4/9 = 0.44, e refused by safety 1 < 2.
    # high has 8 bytes: a and c; b (4 bytes) and d go to medium.
    tiers = {path.stem: parquet.read_table(path).to_pylist() for path in (out / "documents").iterdir()}
    assert {name: [row["id"] for row in rows] for name, rows in tiers.items()} == {
        "high-00000": ["a"],
        "high-00001": ["c"],
        "medium-00000": ["b"],
        "medium-00001": ["d"],
    }
    assert tiers["high-00001"][0]["utility"] == pytest.approx(7 / 9 + 0.2)
    assert set(tiers["high-00000"][0]) == {"id", "text", "source", "tier", "utility"}
    dropped = parquet.read_table(out / "dropped.parquet").to_pylist()
    assert [(row["id"], row["reason"], row["excerpt"]) for row in dropped] == [("e", "safety below 2", "eeee")]
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["raw"]["book"] == {"documents": 2, "bytes": 8}
    assert ledger["tiers"]["medium"] == {
        "book": {"documents": 1, "bytes": 4},
        "web": {"documents": 1, "bytes": 4},
    }
    assert summary["raw"] == {"documents": 5, "bytes": 20}
    assert summary["kept"] == {"documents": 4, "bytes": 16}
    assert [sample["id"] for sample in summary["samples"]["high"]] == ["a", "c"]
    json.dumps(summary)
    assert sorted(path.name for path in out.iterdir()) == ["documents", "dropped.parquet", "ledger.json"]


def _files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_to_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, resumed = tmp_path / "clean", tmp_path / "resumed"
    (resumed / "documents").mkdir(parents=True)
    (resumed / "documents" / "old.parquet").write_bytes(b"PAR1")
    (resumed / "documents" / ".high-00000.parquet.building").write_bytes(b"PAR1")
    clean.mkdir()
    mix.run(CONFIG, Work(clean, inputs))
    write, made = mix._write_part, []

    def stopped(item: tuple[Path, tuple[str, ...]], number: int, out: Path, tick: Tick) -> dict[str, Any]:
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt
        return write(item, number, out, tick)

    monkeypatch.setattr(mix, "_write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        mix.run(CONFIG, Work(resumed, inputs))
    mix.run(CONFIG, Work(resumed, inputs))
    assert made == [0, 1, 1]
    assert _files(resumed) == _files(clean)


def test_the_number_of_workers_changes_nothing(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upweight.store.parts.WORTH_PROCESSES", 1)
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        mix.run(CONFIG, Work(tmp_path / str(workers), inputs, Machine(workers=workers)))
    assert _files(tmp_path / "1") == _files(tmp_path / "2")


def test_a_ledger_that_does_not_add_up_is_a_defect() -> None:
    amounts = {"book": {"documents": 1, "bytes": 4}}
    ledger = {"raw": amounts, "kept": amounts, "dropped": {}, "tiers": {"high": amounts}}
    mix._reconcile(ledger, {"high": amounts, "dropped": {}})
    with pytest.raises(AssertionError, match="does not match"):
        mix._reconcile(ledger, {"high": {"book": {"documents": 1, "bytes": 3}}, "dropped": {}})
    with pytest.raises(AssertionError, match="not what came in"):
        mix._reconcile({**ledger, "raw": {}}, {"high": amounts, "dropped": {}})


def test_missing_similarities_and_repeated_ids_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    path = inputs["similarity"] / "similarity.parquet"
    parquet.write_table(parquet.read_table(path).slice(1), path)
    with pytest.raises(UserError, match="lacks document a: run retrieve"):
        mix.run(CONFIG, Work(tmp_path, inputs))
    twice = inputs["documents"] / "documents" / "2.parquet"
    twice.write_bytes((inputs["documents"] / "documents" / "0.parquet").read_bytes())
    with pytest.raises(UserError, match="an id twice"):
        mix.run(CONFIG, Work(tmp_path, inputs))
    with pytest.raises(UserError, match="ledger uses the name"):
        mix.Config(tiers=(Tier("dropped"),))
