import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.work import Work
from upweight.curate.readers import JsonLines
from upweight.stages import ingest
from upweight.synthesize.stories import StoryDocuments

PROSE = "The river rises in the hills, and falls to the sea after forty miles."


def _lines(path: Path, lines: list[bytes]) -> JsonLines:
    path.write_bytes(b"\n".join(lines))
    return JsonLines(str(path), "own")


def _good(count: int) -> list[bytes]:
    return [json.dumps({"text": f"{PROSE}\r\nNumber {number}.  \r\n"}).encode() for number in range(count)]


def test_what_is_kept_rejected_and_dropped_is_written_and_counted(tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.jsonl", [*_good(20), b"{broken", b'{"text": "short"}'])
    out = tmp_path / "out"
    out.mkdir()
    summary = ingest.run(ingest.Config((source, StoryDocuments(30, damaged_share=0.0))), Work(out, {}))
    rows = [row for path in sorted((out / "documents").iterdir()) for row in parquet.read_table(path).to_pylist()]
    assert len(rows) == 50
    assert set(rows[0]) == {"id", "text", "source"}
    assert rows[0]["text"] == f"{PROSE}\nNumber 0."
    dropped = parquet.read_table(out / "dropped.parquet").to_pylist()
    assert [(row["reason"], row["detail"]) for row in dropped] == [
        ("no JSON object", f"{tmp_path / 'a.jsonl'}, line 21"),
        ("too short", "5 characters, at least 40"),
    ]
    assert summary["records"] == 52
    assert summary["kept"] == 50
    assert summary["rejected"] == {"no JSON object": 1}
    assert summary["dropped"] == {"too short": 1}
    assert summary["by_source"]["own"]["records"] == 22
    assert summary["by_source"]["story-worked"]["kept"] == 30
    assert summary["kept_bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert summary["examples"]["too short"][0]["excerpt"] == "short"
    json.dumps(summary)


def test_the_fingerprint_tells_whether_the_same_texts_were_read(tmp_path: Path) -> None:
    prints = []
    for name, lines in (("a", _good(5)), ("b", _good(5)), ("c", [*_good(4), *_good(1)])):
        (tmp_path / name).mkdir()
        config = ingest.Config((_lines(tmp_path / f"{name}.jsonl", lines),))
        prints.append(ingest.run(config, Work(tmp_path / name, {}))["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_a_killed_run_is_overwritten_with_the_same_bytes(tmp_path: Path) -> None:
    config = ingest.Config((StoryDocuments(50),))
    clean, resumed = tmp_path / "clean", tmp_path / "resumed"
    clean.mkdir()
    (resumed / "documents").mkdir(parents=True)
    for left in ("00000-00000.parquet", "00007-00000.parquet", ".00000-00000.parquet.building"):
        (resumed / "documents" / left).write_bytes(b"PAR1 half")
    assert ingest.run(config, Work(clean, {})) == ingest.run(config, Work(resumed, {}))
    for root in (clean, resumed):
        assert [path.name for path in (root / "documents").iterdir()] == ["00000-00000.parquet"]
    for name in ("documents/00000-00000.parquet", "dropped.parquet"):
        assert (clean / name).read_bytes() == (resumed / name).read_bytes()


def test_a_run_that_goes_on_reads_a_file_again_that_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _lines(tmp_path / "a.jsonl", _good(5)), _lines(tmp_path / "b.jsonl", _good(7))
    config, work = ingest.Config((first, second)), Work(tmp_path / "out", {})
    work.out.mkdir()
    read, killed = ingest._read, []

    def stopped(item: Any, place: int, out: Path, tick: Any) -> dict[str, Any]:
        if place == 1 and not killed:
            killed.append(place)
            raise KeyboardInterrupt
        return read(item, place, out, tick)

    monkeypatch.setattr(ingest, "_read", stopped)
    with pytest.raises(KeyboardInterrupt):
        ingest.run(config, work)
    _lines(tmp_path / "a.jsonl", _good(9))  # its download had not been complete
    assert ingest.run(config, work)["kept"] == 16


def test_too_many_unreadable_records_stop_the_run(tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.jsonl", [*_good(8), b"{broken", b"{broken"])  # a share of 0.2
    with pytest.raises(UserError, match=r"2 of 10 records could not be read.*a\.jsonl, line 9"):
        ingest.run(ingest.Config((source,)), Work(tmp_path / "out", {}))
    assert not list((tmp_path / "out").rglob("*.building"))
    kept = ingest.run(ingest.Config((source,), most_rejected_share=0.2), Work(tmp_path / "out", {}))["kept"]
    assert kept == 8


def test_nothing_to_read_and_nothing_left_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sources"):
        ingest.Config(())
    for name, lines, why in (("empty", [], "the sources are empty"), ("short", [b'{"text": "a"}'], "1 too short")):
        with pytest.raises(UserError, match=f"no document is left.*{why}"):
            ingest.run(ingest.Config((_lines(tmp_path / name, lines),)), Work(tmp_path / "out", {}))


def test_estimate_grows_with_what_the_sources_say() -> None:
    few, many = (ingest.estimate(ingest.Config((StoryDocuments(count),)), {}) for count in (100, 100_000))
    assert few.disk_bytes < many.disk_bytes
    assert few.seconds < many.seconds
