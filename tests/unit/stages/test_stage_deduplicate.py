import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Machine, Work
from upweight.stages import deduplicate
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.stories import StoryDocuments, problem, story, worked

RESERVED = [story(7, index, fewest_steps=3, evaluation=True) for index in range(40)]
LONG = " ".join(f"word{number}" for number in range(300))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """400 stories, and planted among them: an exact and a near duplicate, and the worked stories of the evaluation."""
    stories = list({document.id: document for document in StoryDocuments(400, damaged_share=0.0).documents()}.values())
    planted = [
        Document.of(LONG, "web"),
        Document.of(LONG.upper(), "web"),  # exact but for case
        Document.of(LONG.replace("word150", "other"), "copy"),  # 5 of 296 runs differ: J = 291/301 = 0.97
        stories[0],  # the same document again
        *(Document.of(worked(told), "leak") for told in RESERVED),
    ]
    root = tmp_path / "in"
    (root / "documents").mkdir(parents=True)
    for number, part in enumerate((stories, planted)):
        rows = [{"id": document.id, "text": document.text, "source": document.source} for document in part]
        parquet.write_table(arrow.Table.from_pylist(rows), root / "documents" / f"{number:05d}.parquet")
    problems = tmp_path / "problems"
    problems.mkdir()
    write_jsonl(problems / "reserved_stem.jsonl", [problem(told) for told in RESERVED])
    return {"documents": root, "problems": problems}


def _run(inputs: dict[str, Path], out: Path) -> dict[str, object]:
    out.mkdir(exist_ok=True)
    return dict(deduplicate.run(deduplicate.Config(), Work(out, inputs)))


def test_planted_documents_are_dropped_for_their_reason_and_stories_stay(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    summary = _run(inputs, tmp_path / "out")
    assert summary["dropped"] == {"contaminated": 40, "exact duplicate": 2, "near duplicate": 1}
    rows = [
        row
        for path in sorted((tmp_path / "out" / "documents").iterdir())
        for row in parquet.read_table(path).to_pylist()
    ]
    assert len(rows) == summary["kept"] == summary["documents"] - 43  # type: ignore[operator]
    assert len({row["id"] for row in rows}) == len(rows)
    assert LONG in {row["text"] for row in rows}  # the first of its cluster stays
    dropped = parquet.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    near = next(row for row in dropped if row["reason"] == "near duplicate")
    assert near["source"] == "copy"
    assert Document.of(LONG, "web").id in near["detail"]
    leaks = [row for row in dropped if row["source"] == "leak"]
    assert len(leaks) == 40
    assert all(row["reason"] == "contaminated" for row in leaks)
    assert RESERVED[0].question[:40] in leaks[0]["detail"]
    assert problem(RESERVED[0]).id in leaks[0]["detail"]
    assert summary["problems_compared"] == 40
    json.dumps(summary)


def test_what_is_kept_holds_no_problem_any_more(inputs: dict[str, Path], tmp_path: Path) -> None:
    _run(inputs, tmp_path / "once")
    again = _run({**inputs, "documents": tmp_path / "once"}, tmp_path / "twice")
    assert again["dropped"] == {}
    assert again["kept"] == again["documents"]


def test_a_killed_run_is_overwritten_with_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    clean, resumed = tmp_path / "clean", tmp_path / "resumed"
    (resumed / "documents").mkdir(parents=True)
    for left in ("00003-00000.parquet", ".00000-00000.parquet.building"):
        (resumed / "documents" / left).write_bytes(b"PAR1 half")
    assert _run(inputs, clean) == _run(inputs, resumed)
    for name in ("documents/00000-00000.parquet", "documents/00001-00000.parquet", "dropped.parquet"):
        assert (clean / name).read_bytes() == (resumed / name).read_bytes()
    names = sorted(path.name for path in (resumed / "documents").iterdir())
    assert names == ["00000-00000.parquet", "00001-00000.parquet"]


def test_problems_are_optional_and_may_come_from_files_of_ones_own(inputs: dict[str, Path], tmp_path: Path) -> None:
    documents = {"documents": inputs["documents"]}
    assert "contaminated" not in _run(documents, tmp_path / "a")["dropped"]  # type: ignore[operator]
    own = deduplicate.Config(problem_files=(str(inputs["problems"] / "reserved_stem.jsonl"),))
    summary = deduplicate.run(own, Work(tmp_path / "b", documents))
    assert summary["dropped"]["contaminated"] == 40


@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt"])
def test_tests_of_ones_own_may_have_any_form(inputs: dict[str, Path], tmp_path: Path, form: str) -> None:
    texts = [told.question for told in RESERVED]
    path = tmp_path / f"tests.{form}"
    if form == "parquet":
        parquet.write_table(arrow.table({"n": range(len(texts)), "prompt": texts}), path)
    else:
        path.write_text("\n\n".join(json.dumps({"question": text}) if form == "jsonl" else text for text in texts))
    own = deduplicate.Config(problem_files=(str(tmp_path / "tests.*"),))
    summary = deduplicate.run(own, Work(tmp_path / "b", {"documents": inputs["documents"]}))
    assert summary["dropped"]["contaminated"] == 40
    assert "of problem" in summary["examples"]["contaminated"][0]["detail"]


def test_the_number_of_workers_changes_nothing(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upweight.store.parts.WORTH_PROCESSES", 0)
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in enumerate(outs, start=1):
        out.mkdir()
        deduplicate.run(deduplicate.Config(), Work(out, inputs, Machine(workers=workers)))
    files = [{path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")} for out in outs]
    assert files[0] == files[1]


def test_wrong_inputs_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no documents/"):
        _run({"documents": tmp_path}, tmp_path / "out")
    with pytest.raises(UserError, match="holds no reserved_"):
        _run({**inputs, "problems": tmp_path}, tmp_path / "out")
