"""Problems of several kinds judged side by side, each by the verifier of its kind."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from upweight.core.records import Problem
from upweight.core.work import Machine
from upweight.verify.reward import CheckVerifier, RewardConfig, kind_of, open_verifier


@contextmanager
def open_checks(problems: Sequence[Problem], machine: Machine) -> Iterator[CheckVerifier]:
    """A verifier for all of these problems, opened at once, so that what cannot be had is refused before work begins;
    the sandbox is opened only where one of them has tests."""
    with ExitStack() as opened:
        verifier = CheckVerifier(lambda kind: opened.enter_context(open_verifier(RewardConfig(kind), {}, machine)))
        for kind in sorted({kind_of(problem) for problem in problems}):
            verifier.of(kind)
        yield verifier
