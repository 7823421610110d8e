"""Problems of several kinds judged side by side, each by the verifier of its kind."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.core.work import Machine
from upweight.verify.reward import Checkable, RewardConfig, kind_of, open_verifier


@dataclass(frozen=True)
class CheckVerifier(Verifier):
    """Hands each problem to the verifier of its kind."""

    verifiers: Mapping[Checkable, Verifier]

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        kind = kind_of(problem)
        if kind not in self.verifiers:
            raise UserError(f"problem {problem.id} is judged by {kind}, and nothing to judge it with was opened")
        return self.verifiers[kind].score(problem, group)


@contextmanager
def open_checks(problems: Sequence[Problem], machine: Machine) -> Iterator[CheckVerifier]:
    """A verifier for all of these problems; the sandbox is opened only where one of them has tests."""
    with ExitStack() as opened:
        kinds = sorted({kind_of(problem) for problem in problems})
        yield CheckVerifier(
            {kind: opened.enter_context(open_verifier(RewardConfig(kind), {}, machine)) for kind in kinds}
        )
