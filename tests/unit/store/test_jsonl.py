"""Records survive the round trip, bad lines are named, and no half file is ever seen."""

from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Completion, Message, Pair, Problem, Tags, ToolCall
from upweight.store.jsonl import iterate_jsonl, read_jsonl, write_jsonl

PROBLEM = Problem(
    id="p1",
    messages=(Message("user", "2 + 2? “ü”"), Message("assistant", "", tool_calls=(ToolCall("c", "run", "{}"),))),
    answer="4",
    tests=("assert True",),
    source="stem",
)
COMPLETION = Completion(tokens=(1, 2), logprobs=(-0.1, -1.0000000001), text="4", stop="end", policy="abc")


def test_records_come_back_equal(tmp_path: Path) -> None:
    pairs = [Pair(PROBLEM, COMPLETION, COMPLETION), Pair(PROBLEM, COMPLETION, COMPLETION)]
    assert write_jsonl(tmp_path / "pairs.jsonl", iter(pairs)) == 2
    assert read_jsonl(tmp_path / "pairs.jsonl", Pair) == pairs
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_plain_data_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"a": 1}\n\n{"a": [2, null]}\n')
    assert read_jsonl(path, dict) == [{"a": 1}, {"a": [2, None]}]


@pytest.mark.parametrize(
    "line",
    ["{", '{"id": 3, "messages": []}', '{"messages": []}', "[]", '{"id": "\xff"}'],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, [PROBLEM])
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2"):
        read_jsonl(path, Problem)


def test_a_record_that_refuses_itself_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "tags.jsonl"
    path.write_text('{"document_id": "d", "scores": [1, 2]}\n')
    with pytest.raises(UserError, match="line 1: document d: 2 scores, expected 20"):
        read_jsonl(path, Tags)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        next(iterate_jsonl(tmp_path / "none.jsonl", Problem))


def test_a_writer_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, [PROBLEM])

    def failing():
        yield PROBLEM
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_jsonl(path, failing())
    assert read_jsonl(path, Problem) == [PROBLEM]
    assert [item.name for item in tmp_path.iterdir()] == ["problems.jsonl"]
