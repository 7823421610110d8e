"""Problems of several kinds judged side by side: by their tests where they have them, by their answers otherwise."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.core.work import Machine
from upweight.verify.reward import RewardConfig, open_verifier


@dataclass(frozen=True)
class CheckVerifier(Verifier):
    """Hands each problem to the verifier of its kind."""

    answers: Verifier
    tests: Verifier | None

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if not problem.tests:
            return self.answers.score(problem, group)
        if self.tests is None:
            raise UserError(f"problem {problem.id} has tests, but nothing to run them with was opened")
        return self.tests.score(problem, group)


@contextmanager
def open_checks(problems: Sequence[Problem], machine: Machine) -> Iterator[CheckVerifier]:
    """A verifier for all of these problems; the sandbox is opened only where one of them has tests."""
    with ExitStack() as opened:
        answers = opened.enter_context(open_verifier(RewardConfig(kind="answer"), {}, machine))
        tests = None
        if any(problem.tests for problem in problems):
            tests = opened.enter_context(open_verifier(RewardConfig(kind="code"), {}, machine))
        yield CheckVerifier(answers, tests)
