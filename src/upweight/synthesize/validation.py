"""Is a coding problem sound? Found out by running: its solution passes, twice, and no wrong program does.

What runs the programs is given: any Verifier that runs tests (verify/code_tests.py, in the sandbox), the same that will
reward a model, so that a problem which cannot be judged is found here and not in training.
"""

from collections.abc import Sequence

from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem


def flaw(problem: Problem, solution: str, wrong: Sequence[str], verifier: Verifier) -> str | None:
    """Why the problem is unfit, None where it is sound.

    Args:
        problem: with tests.
        solution: has to pass every time; it is run twice, so that tests which depend on chance show.
        wrong: programs that must not pass (mutants of the solution, trivial programs).
        verifier: scores 1 where all tests pass.
    """
    if not problem.tests:
        return "no tests"
    texts = (solution, solution, *wrong)
    verdicts = verifier.score(problem, [Completion((), (), text, "end", "reference") for text in texts])
    for verdict in verdicts[:2]:
        if verdict.score < 1:
            return f"the solution fails: {verdict.reason}"
    for text, verdict in zip(wrong, verdicts[2:], strict=True):
        if verdict.score >= 1:
            return f"a wrong program passes: {text}"
    return None
