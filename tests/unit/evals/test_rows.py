"""Rows come from a file, a package or the hub, and what is missing is named with how to give it."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.records import Message, Problem, Sample
from upweight.evals.rows import DataSet, Questions, Row, read_rows
from upweight.evals.setting import Setting, benchmark_names, open_module
from upweight.verify.answers import AnswerVerifier

ROWS = [{"question": "2 + 3?", "answer": "5"}, {"question": "1\u2028or\x85 2?", "answer": "1"}]


def test_each_kind_of_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "a.csv").write_text('question,answer\n2 + 3?,5\n1\u2028or\x85 2?,"1"\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for ending in ("jsonl", "json", "csv", "jsonl.gz", "parquet"):
        assert read_rows(tmp_path / f"a.{ending}") == ROWS, ending


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"', "line 2 is no JSON object"),
        ("a.json", b"[1,", "no JSON list"),
        ("a.jsonl.gz", b"not compressed", "cannot be read to its end"),
        ("a.parquet", b"PAR1", "cannot be read to its end"),
        ("a.txt", b"x", "expected a file that ends in"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_rows(tmp_path / name)


def test_what_is_wanted_is_said() -> None:
    with pytest.raises(UserError, match=r"there is no file nowhere\.csv"):
        DataSet(hub="a/b").rows("x", Path("nowhere.csv"))
    lone = DataSet(package="no_such_package", install="--no-deps no-such")
    with pytest.raises(UserError, match=r"x wants the package no_such_package \(pip install --no-deps no-such\)"):
        lone.rows("x", None)
    gated = DataSet(hub="owner/name", subset="part", gated=True)
    assert gated.wanted() == "the data set owner/name (part), whose terms have to be accepted on the hub first"


def problem(row: Row, index: int) -> Problem | None:
    if row["answer"] == "none":
        return None
    return Problem(f"q{index}", (Message("user", row["question"]),), row["answer"], (), row.get("kind", ""))


def questions(path: Path) -> Questions:
    return Questions("own", DataSet(hub="a/b"), problem, AnswerVerifier(), 2, Setting(data=path))


def test_rows_become_problems_and_shares_are_told_by_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{**ROWS[0], "kind": "sums"}, {"question": "?", "answer": "none"}, {**ROWS[1], "kind": "numbers"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = questions(path)
    assert [found.id for found in asked.problems()] == ["q0", "q2"]
    samples = [Sample(name, i, score, "", "end", 1, "", "", "") for name, i, score in
               [("q0", 0, 1.0), ("q0", 1, 0.0), ("q2", 0, 1.0), ("q2", 1, 1.0)]]  # fmt: skip
    assert asked.figures(samples) == {"numbers": 1.0, "sums": 0.5}
    part = replace(asked, setting=replace(asked.setting, parts=("numbers",)))
    assert [found.id for found in part.problems()] == ["q2"]
    with pytest.raises(UserError, match="own has no part 'number': it has numbers, sums"):
        replace(asked, setting=replace(asked.setting, parts=("number",))).problems()


def test_rows_of_another_data_set_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "answer": "1"}\n{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"own, row 2 is not as this benchmark's data are .*it has prompt"):
        questions(path).problems()
    path.write_text('{"question": "x", "answer": "none"}\n')
    with pytest.raises(UserError, match="no row of"):
        questions(path).problems()


def test_every_benchmark_says_what_it_is_and_ones_own_is_checked() -> None:
    import types

    assert {"aime2024", "aime2025", "gpqa", "supergpqa", "bfcl", "fullstack", "arena_hard"} <= set(benchmark_names())
    module = types.ModuleType("mine")
    with pytest.raises(UserError, match=r"mine\.py defines no benchmark"):
        open_module(module, "mine.py", Setting())
