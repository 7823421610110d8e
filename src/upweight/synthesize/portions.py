"""Which of the posed problems a step works on.

Refinement, distillation and reinforcement each want problems that no earlier step has trained on: a checkpoint solves
what it was taught, so a gate would measure memory, and reward would rise on it alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.records import Problem
from upweight.store.jsonl import iterate_jsonl

ASSUMED_PROBLEMS = 1000
"""What a plan reckons with where a portion takes all that there is."""


@dataclass(frozen=True, slots=True)
class Take:
    """Some problems of a file, in its order.

    Attributes:
        count: at most so many; 0 takes all.
        after: how many to pass over first.
    """

    count: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if self.count < 0 or self.after < 0:
            raise UserError(f"take {self.count} problems after {self.after}: both have to be 0 or above")


Portions = Mapping[str, int | Take]
"""By file of the input "problems": what to take of it; a plain number is a count from the beginning."""


def read_portions(directory: Path, portions: Portions) -> list[Problem]:
    """The problems of an artifact that `portions` names. A problem is taken once.

    Raises UserError where a file has nothing left after those to pass over.
    """
    found: dict[str, Problem] = {}
    for file, portion in portions.items():
        take = _take(portion)
        stop = take.after + take.count if take.count else None
        some = list(islice(iterate_jsonl(directory / file, Problem), take.after, stop))
        if not some:
            held = sum(1 for _ in iterate_jsonl(directory / file, Problem))
            raise UserError(
                f"{directory / file} holds {held} problems, and the step takes {take.count or 'all'} after the first "
                f"{take.after}: pose more, or take others"
            )
        for problem in some:
            found.setdefault(problem.id, problem)
    if not found:
        raise UserError(f"the step names no file of {directory} to take problems from: name one")
    return list(found.values())


def listed(portions: Portions, records: Mapping[str, float | int]) -> float:
    """How many problems a plan reckons with, of an artifact whose files hold so many `records`, as far as is known."""
    return sum((_expected(_take(portion), records.get(file)) for file, portion in portions.items()), 0.0)


def _expected(take: Take, held: float | int | None) -> float:
    if held is None:
        return float(take.count or ASSUMED_PROBLEMS)
    left = max(0.0, float(held) - take.after)
    return min(left, float(take.count)) if take.count else left


def _take(portion: int | Take) -> Take:
    return portion if isinstance(portion, Take) else Take(portion)
