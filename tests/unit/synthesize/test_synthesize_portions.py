"""Which problems a step takes: counts, offsets, no problem twice, and what is refused."""

from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Message, Problem
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.portions import ASSUMED_PROBLEMS, Take, listed, read_portions


@pytest.fixture
def posed(tmp_path: Path) -> Path:
    problems = [Problem(f"p{number}", (Message("user", f"{number}?"),), answer=str(number)) for number in range(10)]
    write_jsonl(tmp_path / "ten.jsonl", problems)
    write_jsonl(tmp_path / "again.jsonl", problems[3:6])
    return tmp_path


def names(problems: list[Problem]) -> str:
    return " ".join(problem.id for problem in problems)


def test_portions_of_one_file_are_disjoint(posed: Path) -> None:
    first, second = (read_portions(posed, {"ten.jsonl": portion}) for portion in (4, Take(3, after=4)))
    assert names(first) == "p0 p1 p2 p3"
    assert names(second) == "p4 p5 p6"
    assert names(read_portions(posed, {"ten.jsonl": Take(after=8)})) == "p8 p9"
    assert len(read_portions(posed, {"ten.jsonl": 0})) == 10
    assert names(read_portions(posed, {"ten.jsonl": Take(9, after=8)})) == "p8 p9"


def test_a_problem_is_taken_once(posed: Path) -> None:
    assert names(read_portions(posed, {"again.jsonl": 2, "ten.jsonl": 5})) == "p3 p4 p0 p1 p2"


def test_what_cannot_be_taken_is_refused(posed: Path) -> None:
    with pytest.raises(UserError, match=r"ten\.jsonl holds 10 problems, and the step takes 5 after the first 10"):
        read_portions(posed, {"ten.jsonl": Take(5, after=10)})
    with pytest.raises(UserError, match="names no file"):
        read_portions(posed, {})
    with pytest.raises(UserError, match="0 or above"):
        Take(-1)


def test_a_plan_reckons_with_what_is_taken() -> None:
    assert listed({"a.jsonl": 7, "b.jsonl": Take(5, after=100)}, {}) == 12
    assert listed({"a.jsonl": Take(after=100)}, {}) == ASSUMED_PROBLEMS
    held = {"a.jsonl": 120, "b.jsonl": 3}
    assert listed({"a.jsonl": Take(after=100), "b.jsonl": 5}, held) == 20 + 3
