import gzip
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate import corpus
from upweight.curate.readers import JsonLines, Parquet, Reject, TextTree

LINES = [json.dumps({"text": f"text number {number}", "kind": "b" if number == 1 else None}) for number in range(3)]
WHOLE = ("\n".join(LINES) + "\n\n").encode()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_read_alike_whatever_their_compression(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"part.jsonl{ending}"
    if ending == ".zst":
        with arrow.output_stream(str(path), compression="zstd") as file:
            file.write(WHOLE)
    else:
        path.write_bytes(gzip.compress(WHOLE) if ending else WHOLE)
    read = list(JsonLines(str(tmp_path / "*.jsonl*"), "a", source_field="kind").documents())
    assert read == [Document.of(f"text number {number}", "b" if number == 1 else "a") for number in range(3)]


def test_malformed_lines_are_rejected_with_the_reason_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    lines = [
        (b'{"text": "kept"}', "kept"),
        (b"\xff\x00\xfe", "not UTF-8"),
        (b"{not json", "no JSON object"),
        (b"[1, 2]", "no JSON object"),
        (b'{"n": ' + b"9" * 5000 + b"}", "no JSON object"),  # more digits than Python converts
        (b"[" * 100_000, "no JSON object"),  # deeper than Python recurses
        (b'{"body": "elsewhere"}', "no text"),
        (b'{"text": 3}', "no text"),
        (b'{"text": "  "}', "empty"),
        (b'{"text": "caf\xe9"}', "café"),  # Windows-1252
        (b'{"text": "lone \\ud800"}', "not UTF-8"),
        (b'{"text": "a", "kind": "\\ud800"}', "not UTF-8"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "oversized"),
        (b'{"text": "kept too"}', "kept too"),
    ]
    path.write_bytes(b"\n".join(line for line, _ in lines))
    read = list(JsonLines(str(path), "a", source_field="kind", max_record_bytes=150_000).documents())
    assert [record.reason if isinstance(record, Reject) else record.text for record in read] == [
        expected for _, expected in lines
    ]
    rejects = [record for record in read if isinstance(record, Reject)]
    assert rejects[0].origin == f"{path}, line 2"
    assert rejects[1].excerpt.strip() == "{not json"


@pytest.mark.parametrize("damage", ["cut", "not gzip", "changed"])
def test_of_a_damaged_compressed_file_the_rest_is_rejected_and_reading_goes_on(tmp_path: Path, damage: str) -> None:
    many = "\n".join(json.dumps({"text": f"{number} {number * 7919 % 1000}"}) for number in range(5000))
    packed = bytearray(gzip.compress(many.encode()))
    if damage == "changed":
        packed[400:420] = bytes(255 - byte for byte in packed[400:420])
    content = {"cut": bytes(packed[:3000]), "not gzip": b"plain", "changed": bytes(packed)}[damage]
    (tmp_path / "bad.gz").write_bytes(content)
    (tmp_path / "good.gz").write_bytes(gzip.compress(b'{"text": "after it"}'))
    *before, reject, after = JsonLines(str(tmp_path / "*.gz"), "a").documents()
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.origin) == ("damaged file", str(tmp_path / "bad.gz"))
    assert after == Document.of("after it", "a")
    assert (len(before) > 0) == (damage == "cut")


def test_parquet_rows_sources_and_rejects(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = arrow.table({"body": [b"one", b"\x00\x81\x00", None, b"four"], "kind": ["x", None, None, None]})
    parquet.write_table(table, path)
    read = list(Parquet(str(path), "a", text_column="body", source_column="kind").documents())
    assert read[0] == Document.of("one", "x")
    assert read[3] == Document.of("four", "a")
    assert [record.reason for record in read[1:3] if isinstance(record, Reject)] == ["not UTF-8", "empty"]
    assert isinstance(read[1], Reject)
    assert read[1].origin == f"{path}, row 2"


def test_parquet_of_dictionary_encoded_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"text": arrow.array(["one", "two", "one"]).dictionary_encode()}), path)
    assert [record.text for record in Parquet(str(path), "a").documents()] == ["one", "two", "one"]  # type: ignore[union-attr]


def test_parquet_of_other_kinds_of_text_and_sources(tmp_path: Path) -> None:
    kinds = (arrow.string_view(), arrow.large_string(), arrow.binary(), arrow.binary_view())
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.parquet"
        texts = arrow.array([b"one", b"two"], arrow.binary()).cast(kind if number > 1 else arrow.string()).cast(kind)
        parquet.write_table(arrow.table({"text": texts, "kind": [b"web", None]}), path)
        read = list(Parquet(str(path), "a", source_column="kind").documents())
        assert read == [Document.of("one", "web"), Document.of("two", "a")]


def test_long_rows_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BYTES_AT_ONCE", 3_000)
    texts = [f"{number:03d}" * 300 for number in range(20)]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "rows.parquet", use_dictionary=False)
    file = parquet.ParquetFile(tmp_path / "rows.parquet")
    assert corpus.rows_at_once(file) == 3  # 904 bytes each
    assert [record.text for record in Parquet(str(tmp_path / "rows.parquet"), "a").documents()] == texts  # type: ignore[union-attr]


def test_parquet_that_cannot_be_read_is_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"text": [f"number {number}" for number in range(5000)], "n": [1] * 5000}), path)

    def reject(**columns: str) -> str:
        *_, last = Parquet(str(path), "a", **columns).documents()  # type: ignore[arg-type]
        assert isinstance(last, Reject)
        assert (last.reason, last.origin) == ("damaged file", str(path))
        return last.excerpt

    assert "no column 'body', it has text, n" in reject(text_column="body")
    assert "column 'n' holds int64, not text" in reject(text_column="n")
    whole = bytearray(path.read_bytes())
    whole[1000:1300] = bytes(255 - byte for byte in whole[1000:1300])
    path.write_bytes(bytes(whole))
    assert reject()
    path.write_bytes(b"")
    assert "0 bytes" in reject()


def test_text_trees_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.md").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "aa.txt").write_bytes(bytes(range(256)))
    (tmp_path / "picture.png").write_text("not asked for")
    read = list(TextTree(str(tmp_path), "tree").documents())
    assert [record.text if isinstance(record, Document) else record.reason for record in read] == [
        "first",
        "not UTF-8",
        "third",
    ]


def test_sources_that_find_nothing_say_so(tmp_path: Path) -> None:
    for source in (JsonLines(str(tmp_path / "*.jsonl"), "a"), Parquet(str(tmp_path / "*.parquet"), "a")):
        with pytest.raises(UserError, match="no file matches"):
            list(source.documents())
    with pytest.raises(UserError, match="is no directory"):
        list(TextTree(str(tmp_path / "missing"), "a").documents())
    with pytest.raises(UserError, match="holds no file like"):
        list(TextTree(str(tmp_path), "a").documents())
