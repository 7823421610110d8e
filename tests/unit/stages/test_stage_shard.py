import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.work import Machine, Work
from upweight.stages import shard
from upweight.stages.mix import KEPT_SCHEMA
from upweight.stages.shard import Config, Pool
from upweight.store.shards import Shards
from upweight.synthesize.stories import StoryDocuments
from upweight.text.tokenizer import Tokenizer

COUNT = 240
CONFIG = Config(
    pools={"good": Pool(("high",), ("story-*",)), "rest": Pool(("high", "low"))},
    vocabulary=300,
    control_sources=("chat",),
    heldout_share=0.1,
    heldout_most=5,
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two tiers in two files, in row groups of 30; some of one source hold a control token."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "documents").mkdir()
    made = list(StoryDocuments(COUNT, seed=1).documents())
    rows = [
        {"id": d.id, "text": d.text, "source": d.source, "tier": "high", "utility": 0.5} if n % 3 else
        {"id": d.id, "text": f"<|im_start|>{d.text}", "source": ("chat", "web")[n % 2], "tier": "low", "utility": 0.1}
        for n, d in enumerate(made)
    ]  # fmt: skip
    for tier in ("high", "low"):
        table = arrow.Table.from_pylist([row for row in rows if row["tier"] == tier], schema=KEPT_SCHEMA)
        parquet.write_table(table, root / "documents" / f"{tier}.parquet", row_group_size=30)
    return root


def _files(root: Path) -> Mapping[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def _run(documents: Path, out: Path, **machine: int) -> Mapping[str, object]:
    out.mkdir(exist_ok=True)
    return shard.run(CONFIG, Work(out, {"documents": documents}, Machine(**machine), seed=3))


@pytest.fixture(scope="module")
def whole(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    summary = _run(documents, out)
    assert summary["documents_in_no_pool"] == {}
    assert sorted(path.name for path in out.iterdir()) == ["heldout.jsonl", "pools.json", "shards", "tokenizer"]
    return out


def test_every_document_is_in_one_pool_or_held_out(documents: Path, whole: Path) -> None:
    tokenizer = Tokenizer.load(whole / "tokenizer")
    texts = {row["id"]: row for file in sorted((documents / "documents").iterdir()) for row in _rows(file)}
    found: list[str] = []
    for pool in ("good", "rest"):
        shards = Shards.open(whole / "shards" / pool)
        for number in range(len(shards)):
            row = texts[shards.document_id(number)]
            *tokens, last = shards.sequence(number).tolist()
            assert last == tokenizer.end_of_text
            assert tokens == tokenizer.encode_many([row["text"]], control=row["source"] == "chat")[0]
            assert pool == ("good" if row["tier"] == "high" else "rest")
        found += [shards.document_id(number) for number in range(len(shards))]
        assert len(shards) == sum(c["documents"] for c in json.loads((whole / "pools.json").read_text())[pool].values())
    heldout = [json.loads(line)["id"] for line in (whole / "heldout.jsonl").read_text().splitlines()]
    assert len(found) == len(set(found))
    assert not set(found) & set(heldout)
    assert len(heldout) == 10  # at most 5 a pool, of about 16 and 8


def _rows(file: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = parquet.read_table(file).to_pylist()
    return rows


def test_parts_and_workers_change_nothing(
    documents: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "DOCUMENTS_OF_PART", 50)
    monkeypatch.setattr("upweight.store.parts.WORTH_PROCESSES", 10)
    _run(documents, tmp_path / "out", workers=2)
    assert _files(tmp_path / "out") == _files(whole)


def test_a_killed_run_goes_on_with_the_parts_that_are_left(
    documents: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "DOCUMENTS_OF_PART", 50)
    encode, made = shard._encode, []

    def stopped(item: object, place: int, *rest: object) -> object:
        made.append(place)
        if len(made) == 3:
            raise KeyboardInterrupt
        return encode(item, place, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "_encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        _run(documents, tmp_path / "out", workers=1)
    monkeypatch.setattr(shard, "_make_tokenizer", encode)  # is not called again: it could not read such an item
    _run(documents, tmp_path / "out", workers=1)
    assert made == [0, 1, 2, 2, 3, 4]  # 160 documents in parts of 60, 60 and 40, 80 of 60 and 20
    assert _files(tmp_path / "out") == _files(whole)


def test_an_empty_pool_is_named(documents: Path, tmp_path: Path) -> None:
    config = Config(pools={"none": Pool(("medium",))}, vocabulary=300, tokenizer=None)
    with pytest.raises(UserError, match="pool 'none' is empty"):
        shard.run(config, Work(tmp_path, {"documents": documents}))
    with pytest.raises(UserError, match="run mix before shard"):
        shard.run(config, Work(tmp_path, {"documents": tmp_path}))
