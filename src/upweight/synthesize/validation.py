"""Is a coding problem sound? Found out by running: its solution passes, twice, and no wrong program does.

The programs here are procedural, written by us and not by a model, so many share one run of the sandbox. What a model
wrote is judged one program at a time, by verify/code_tests.py.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from upweight.core.records import Problem
from upweight.rollout.sandbox import Sandbox, SandboxLimits

LIMITS = SandboxLimits(cpu_seconds=20.0, wall_seconds=60.0)
"""For all programs of one run together."""


class Posed(NamedTuple):
    """A problem with tests, its solution, and programs that must not pass (mutants of it, trivial programs)."""

    problem: Problem
    solution: str
    wrong: tuple[str, ...]


Runner = Callable[[Sequence[tuple[Sequence[str], Sequence[str]]]], list[list[str]]]
"""(programs, tests) for each problem -> for each program how it failed, "" where it passed all tests."""


def flaws(posed: Sequence[Posed], run: Runner) -> list[str | None]:
    """Why each problem is unfit, None where it is sound. The solution is run twice, so that chance in tests shows."""
    outcomes = run([((one.solution, one.solution, *one.wrong), one.problem.tests) for one in posed])
    return [_flaw(one, outcome) for one, outcome in zip(posed, outcomes, strict=True)]


def _flaw(posed: Posed, outcome: Sequence[str]) -> str | None:
    if not posed.problem.tests:
        return "no tests"
    failure = outcome[0] or outcome[1]
    if failure:
        return f"the solution fails: {failure}"
    for program, failure in zip(posed.wrong, outcome[2:], strict=True):
        if not failure:
            return f"a wrong program passes: {program}"
    return None


_HARNESS = """
import json

def attempt(program, tests):
    space = {}
    try:
        exec(program, space)
        for test in tests:
            exec(test, space)
    except Exception as error:
        return type(error).__name__
    return ""

print(json.dumps([[attempt(program, tests) for program in programs] for programs, tests in json.loads(WORK)]))
"""


def sandboxed(sandbox: Sandbox) -> Runner:
    """A runner that runs all programs of a call in one process of the sandbox. For procedural programs only."""

    def run(work: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[str]]:
        listed = json.dumps([[list(programs), list(tests)] for programs, tests in work])
        execution = sandbox.run(f"WORK = {listed!r}\n{_HARNESS}", limits=LIMITS)
        if not execution.ok:
            raise RuntimeError(f"validating {len(work)} problems failed: {execution.stderr[-500:] or execution}")
        outcomes: list[list[str]] = json.loads(execution.stdout)
        return outcomes

    return run
