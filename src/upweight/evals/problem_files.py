"""Problems from a file: those of an artifact, or one's own. The benchmark of the quickstart.

A line is a Problem of core/records.py, or the short form that people write by hand:

    {"question": "What is 2 + 3?", "answer": "5"}
    {"question": "Write add(a, b).", "tests": ["assert add(2, 3) == 5"]}
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Message, Problem
from upweight.store.jsonl import iterate_jsonl
from upweight.verify.reward import Checkable
from upweight.verify.reward import kind_of as kind_of_problem

SHORT_FIELDS = {"id", "question", "answer", "tests", "source"}


@dataclass(frozen=True)
class ProblemFile(Benchmark):
    """The problems of one file.

    Attributes:
        name: what the table calls it.
        path: the file.
        verifier: judges the completions.
        samples: completions of each problem, the k of avg@k.
        count: the first so many problems; 0 takes all.
    """

    name: str
    path: Path
    verifier: Verifier
    samples: int = 8
    count: int = 0

    def problems(self) -> Sequence[Problem]:
        found = read_problems(self.path)
        return found[: self.count] if self.count else found


def read_problems(path: Path) -> list[Problem]:
    """The problems of `path`, in its order.

    Raises UserError, naming the line, where one is no problem, has nothing to be checked by, or repeats an id; and
    where the file is empty.
    """
    found: dict[str, Problem] = {}
    for number, row in enumerate(iterate_jsonl(path, dict), start=1):
        problem = _problem(row, f"{path}, problem {number}")
        if problem.id in found:
            raise UserError(f"{path}, problem {number}: the id {problem.id!r} is taken by an earlier problem")
        found[problem.id] = problem
    if not found:
        raise UserError(f"{path} holds no problem: write one JSON object a line with a question and an answer or tests")
    return list(found.values())


def kind_of(problems: Sequence[Problem], path: Path) -> Checkable:
    """How these problems are judged, see verify.reward.kind_of.

    Raises UserError where one file mixes kinds: each benchmark has one verifier.
    """
    found = Counter(map(kind_of_problem, problems))
    if len(found) > 1:
        raise UserError(f"{path} mixes problems judged in several ways, {dict(found)}: give each kind its own file")
    return next(iter(found))


def _problem(row: dict[str, Any], where: str) -> Problem:
    if "messages" in row:
        try:
            problem = msgspec.convert(row, Problem)
        except msgspec.ValidationError as error:
            raise UserError(f"{where}: {error}") from None
    else:
        problem = _short(row, where)
    if problem.answer is None and not problem.tests and problem.check is None:
        raise UserError(f"{where} has neither an answer nor tests, so no completion can be judged: add one of them")
    return problem


def _short(row: dict[str, Any], where: str) -> Problem:
    unknown = sorted(row.keys() - SHORT_FIELDS)
    if unknown or not isinstance(row.get("question"), str):
        told = f"has the unknown fields {unknown}" if unknown else "has no question"
        raise UserError(f"{where} {told}: give question, answer or tests, and if you like id and source")
    tests = row.get("tests", [])
    if isinstance(tests, str):
        tests = [tests]
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: tests is a list of Python sources, each of which raises where the solution is wrong")
    answer = row.get("answer")
    return Problem(
        id=str(row.get("id", fingerprint(row["question"]))),
        messages=(Message("user", row["question"]),),
        answer=None if answer is None else str(answer),
        tests=tuple(tests),
        source=str(row.get("source", "")),
    )
