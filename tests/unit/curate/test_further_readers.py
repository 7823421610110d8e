"""Crawls, data sets and object storage, each with something broken in it."""

import gzip
import io
import json
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate.readers import HubDataset, JsonLines, Parquet, Reject, TextTree, Warc
from upweight.curate.source import parts_of

ARTICLE = "<p>" + "The river rises in the hills to the north, and falls to the sea after forty miles. " * 4 + "</p>"
PAGE = f"<html><body><nav><a href=x>Home</a> <a href=y>Shop</a></nav><article><h1>A river</h1>{ARTICLE * 3}</article>"


def _warc(path: Path, pages: list[tuple[str, str, bytes]]) -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    packed = io.BytesIO()
    writer = WARCWriter(packed, gzip=True)
    for status, kind, body in pages:
        headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.0")
        record = writer.create_warc_record(
            f"http://example.org/{len(body)}", "response", payload=io.BytesIO(body), http_headers=headers
        )
        writer.write_record(record)
    writer.write_record(writer.create_warcinfo_record("info", {"software": "test"}))
    path.write_bytes(packed.getvalue())
    return packed.getvalue()


def test_pages_of_a_crawl_become_their_main_text(tmp_path: Path) -> None:
    pytest.importorskip("warcio")
    pytest.importorskip("trafilatura")
    whole = _warc(
        tmp_path / "a.warc.gz",
        [
            ("200 OK", "text/html; charset=utf-8", PAGE.encode()),
            ("404 Not Found", "text/html", PAGE.encode()),
            ("200 OK", "image/png", b"\x89PNG"),
            ("200 OK", "text/plain", "plain café".encode("cp1252")),
            ("200 OK", "text/html", b"<html><body></body></html>"),
            ("200 OK", "text/html", b"<p>" + b"x" * 60_000),
        ],
    )
    (tmp_path / "b.warc.gz").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "c.warc.gz").write_bytes(b"no crawl")
    read = list(Warc(str(tmp_path / "*.warc.gz"), "web", max_record_bytes=50_000).documents())
    page, plain, empty, long, *rest = read
    assert isinstance(page, Document)
    assert page.text.startswith("A river") or page.text.startswith("# A river") or "The river rises" in page.text
    assert "Shop" not in page.text
    assert isinstance(plain, Document)
    assert plain.text == "plain café"
    assert isinstance(empty, Reject)
    assert isinstance(long, Reject)
    assert (empty.reason, long.reason) == ("no text", "oversized")
    assert "http://example.org/26" in empty.origin
    assert [record.origin for record in rest if isinstance(record, Reject)][-1] == str(tmp_path / "c.warc.gz")


def test_a_data_set_of_a_directory_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"meta": [{"body": "one"}, {"body": None}, {"body": "  "}, {"body": "four"}], "from": ["x", "x", "x", ""]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    source = HubDataset(str(tmp_path / "set"), "a", text_field="meta.body", source_field="from")
    read = list(source.documents())
    assert read[0] == Document.of("one", "x")
    assert [record.reason for record in read[1:3] if isinstance(record, Reject)] == ["no text", "empty"]
    assert read[3] == Document.of("four", "a")


def test_object_storage_is_read_as_files_are(tmp_path: Path) -> None:
    import fsspec
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with fsspec.open("memory://bucket/a/one.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"title": "T", "text": "one"}\n'))
    with fsspec.open("memory://bucket/a/two.parquet", "wb") as file:
        parquet.write_table(arrow.table({"text": ["two"]}), file)
    with fsspec.open("memory://bucket/a/b/three.md", "wb") as file:
        file.write(b"---\ntitle: x\n---\nthree")
    lines = JsonLines("memory://bucket/**/*.jsonl.gz", "a", text_field=("title", "text"))
    assert list(lines.documents()) == [Document.of("T\n\none", "a")]
    assert list(Parquet("memory://bucket/a/two.parquet", "a").documents()) == [Document.of("two", "a")]
    tree = TextTree("memory://bucket/a", "a", front_matter=False)
    assert list(tree.documents()) == [Document.of("three", "a")]
    with fsspec.open("memory://bucket/odd[1].jsonl", "wb") as file:
        file.write(b'{"text": "four"}')
    odd = [part.source for part in JsonLines("memory://bucket/odd*", "a").parts()]
    assert [record for source in odd for record in source.documents()] == [Document.of("four", "a")]
    with pytest.raises(UserError, match="no file matches 'memory://bucket/none"):
        list(JsonLines("memory://bucket/none/*.jsonl", "a").documents())
    with pytest.raises(UserError, match="nosuch://bucket/x cannot be opened"):
        list(JsonLines("nosuch://bucket/x", "a").documents())


@pytest.mark.parametrize("kind", ["lines", "tree"])
def test_the_parts_of_a_source_are_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("upweight.curate.source.PART_BYTES", 40)
    monkeypatch.setattr("upweight.curate.readers.TREE_FILES_OF_PART", 2)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": f"text {number}"}) + "\n")
    source = JsonLines(str(tmp_path / "*.jsonl"), "a") if kind == "lines" else TextTree(str(tmp_path), "a")
    parts = parts_of(source)
    assert [part.files for part in parts] == [2, 2, 1]  # 19 bytes a file of lines, two of them within 40
    assert [record for part in parts for record in part.source.documents()] == list(source.documents())
