"""Contract 9: the gate keeps exactly the problems with 0.1 < avg@16 < 0.9, and reports what it dropped and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Message, Problem
from upweight.synthesize.difficulty import Gate, Measured, histogram, measure
from upweight.verify.answers import AnswerVerifier


@dataclass(frozen=True)
class Knows(Sampler):
    """Solves the problem whose question is the number i in i of its samples, the right ones last."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [
            [
                Completion((1,), (), "\\boxed{1}" if sample >= count - int(prompt[-1].content) else "", "end", "p")
                for sample in range(count)
            ]
            for prompt in prompts
            if not isinstance(prompt, str)
        ]


def kept(gate: Gate, most: int) -> list[int]:
    problems = [Problem(str(right), (Message("user", str(right)),), answer="1") for right in range(most + 1)]
    measured = measure(problems, Knows(), AnswerVerifier(), gate, Limits(max_new_tokens=1))
    assert [one.problem for one in measured] == problems  # nothing is lost: dropped ones are there with a reason
    for one in measured:
        assert one.samples == gate.count
        assert (one.dropped is None) == (gate.low < one.rate < gate.high)
        assert one.dropped in (None, "too hard" if one.rate <= gate.low else "too easy")
    return [int(one.problem.id) for one in measured if one.dropped is None]


def test_of_sixteen() -> None:
    # 0.1 x 16 = 1.6 and 0.9 x 16 = 14.4: two to fourteen right answers stay
    assert kept(Gate(), 16) == list(range(2, 15))


def test_the_bounds_themselves_are_outside() -> None:
    # of ten samples, one right is exactly 0.1 and nine right exactly 0.9: both are dropped
    assert kept(Gate(count=10), 10) == list(range(2, 9))


def test_the_successors_filter_is_a_choice_of_bounds() -> None:
    # one to five right of eight: strictly between 0 and 6/8
    assert kept(Gate(count=8, low=0.0, high=0.75), 8) == [1, 2, 3, 4, 5]


def test_rates_that_read_alike_are_counted_together() -> None:
    problem = Problem("p", (Message("user", "?"),), answer="1")
    found = [Measured(problem, rate, 8, 0.0, None) for rate in (0.123451, 0.5, 0.123449)]
    assert histogram(found, Gate())["rates"] == {"0.1234": 1, "0.1235": 1, "0.5": 1}
    alike = [Measured(problem, rate, 8, 0.0, None) for rate in (0.123451, 0.5, 0.123452)]
    assert histogram(alike, Gate())["rates"] == {"0.1235": 2, "0.5": 1}
