"""Programs judged by tests that they cannot forge.

The candidate runs in the sandbox, and whatever shares its process is at its mercy: it could patch `abs`, answer for the
test harness, or end the process with exit code 0. So no test is decided there.

- A test of the form `assert CALL == LITERAL` (also `!=`, `is`, `in`, a bare CALL, or `not CALL`) is taken apart. The
  call is evaluated beside the candidate; its value comes out as data, and is compared here. The literal never goes in.
- Any other test runs as it is, in a process of its own, where the candidate's functions are stand-ins that ask the
  candidate's process (see rollout/inside.py). Plain values come back; objects of the candidate's own classes stay
  there, and a test that would let such an object decide about itself fails as "undecidable".

All tests of a program share one start of it. Tests are hidden from the model, and so are expected values in reasons.
"""

import ast
import builtins
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.rollout.inside import NotPlain, pack, unpack
from upweight.rollout.sandbox import Execution, Sandbox, SandboxLimits, shared_sandbox
from upweight.verify.answers import visible_part

LONGEST_TEST = 1 << 16
"""Characters of a test that is taken apart; longer ones, and deeper ones than Python parses, run as they are."""

_FENCE = re.compile(r"^```[ \t]*+([A-Za-z0-9_+-]*+)[^\n]*+\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda value, expected: bool(value == expected),
    ast.NotEq: lambda value, expected: bool(value != expected),
    ast.Is: lambda value, expected: value is expected,
    ast.IsNot: lambda value, expected: value is not expected,
    ast.In: lambda value, expected: value in expected,
}
_DECIDING = (ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


@dataclass(frozen=True, slots=True)
class Check:
    """A test taken apart: the value of `call` has to stand in the relation `holds` to `expected`."""

    call: str
    expected: Any
    holds: Callable[[Any, Any], bool]
    longest: int
    """Characters that the packed value may have; a longer one cannot be equal and is not even read."""


@dataclass(frozen=True)
class CodeVerifier(Verifier):
    """1 for a program that passes all tests of the problem, else 0.

    The program is what `program_of` finds after the thought.

    Attributes:
        sandbox: where programs run; None takes the pool of the process.
        limits: of one program with all its tests; None takes the sandbox's.
        partial: give the share of passed tests instead.
    """

    sandbox: Sandbox | None = None
    limits: SandboxLimits | None = None
    partial: bool = False

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if not problem.tests:
            raise UserError(
                f"problem {problem.id} (source {problem.source!r}) has no tests: give it some, or use answers"
            )
        sandbox = self.sandbox or shared_sandbox()
        return sandbox.map(lambda completion: self._judge(sandbox, problem.tests, completion), group)

    def _judge(self, sandbox: Sandbox, tests: Sequence[str], completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        code = program_of(completion.text, defines=called(tuple(tests)))
        if code is None:
            return Verdict(0.0, "no program found")
        failures = run_tests(sandbox, code, tests, limits=self.limits, every=self.partial)
        passed = len(tests) - len(failures)
        score = passed / len(tests) if self.partial else float(not failures)
        if not failures:
            return Verdict(score, f"passed {len(tests)} tests")
        index, why = next(iter(sorted(failures.items())))
        return Verdict(score, f"failed {len(failures)} of {len(tests)} tests, number {index + 1}: {why}")


def program_of(text: str, *, defines: Collection[str] = ()) -> str | None:
    """The program that a completion hands in after its thought, None where there is none.

    The last fenced block that says it is Python; where none says so, the last that says nothing (an answer often shows
    what its program prints in a bare block after it); where nothing is fenced, all of the text.

    Args:
        defines: the functions or classes that are asked for: of several blocks the last that defines one of them
            counts, since calls of it are often shown after it. () for a program of any kind.
    """
    visible = visible_part(text)
    if visible is None or not visible.strip():
        return None
    blocks = [(language.lower(), str(body)) for language, body in _FENCE.findall(visible)]
    named = [body for language, body in blocks if language in _PYTHON]
    found = named or [body for language, body in blocks if not language]
    if not found:
        return visible.strip("\n")
    if defines:
        names = "|".join(map(re.escape, sorted(defines)))
        definition = re.compile(rf"^(?:async def|def|class) (?:{names})\b", re.MULTILINE)
        found = [body for body in found if definition.search(body)] or found
    return found[-1]


@lru_cache(maxsize=1024)
def called(tests: tuple[str, ...]) -> frozenset[str]:
    """The names that tests call and Python does not have: what a program has to define."""
    found: set[str] = set()
    for test in tests:
        try:
            nodes = ast.walk(ast.parse(test)) if len(test) <= LONGEST_TEST else ()
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        found.update(node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return frozenset(name for name in found if not hasattr(builtins, name))


def run_tests(
    sandbox: Sandbox, code: str, tests: Sequence[str], *, limits: SandboxLimits | None = None, every: bool = False
) -> Mapping[int, str]:
    """Why which tests fail, by their index; empty where all pass.

    Tests that have to run as they are cost a second start, which is spared where another test failed, unless `every`
    test is to be counted.
    """
    checks = {index: taken_apart(test) for index, test in enumerate(tests)}
    simple = {index: check for index, check in checks.items() if check is not None}
    others = [index for index, check in checks.items() if check is None]
    failures: dict[int, str] = {}
    if simple:
        done = sandbox.run_calls(code, [check.call for check in simple.values()], limits=limits)
        lines = _lines(done)
        for place, (index, check) in enumerate(simple.items()):
            why = _missing(done) if place not in lines else _against(check, *lines[place])
            if why is not None:
                failures[index] = why
    if others and (every or not failures):
        done = sandbox.run_tests(code, [tests[index] for index in others], limits=limits)
        lines = _lines(done)
        for place, index in enumerate(others):
            if place not in lines or (lines[place][0].get("kind") == "ended" and done.timed_out):
                failures[index] = _missing(done)
            elif lines[place][0].get("failure") != "":
                failures[index] = f"{lines[place][0].get('kind')}: {str(lines[place][0].get('failure'))[:200]}"
    elif others:
        failures.update(dict.fromkeys(others, "not run, since another test failed"))
    return failures


@lru_cache(maxsize=4096)
def taken_apart(test: str) -> Check | None:
    """The test as a call and what is expected of its value; None where it has to run as it is."""
    if len(test) > LONGEST_TEST:
        return None
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return None
    claim, wanted = body[0].test, True
    if isinstance(claim, ast.UnaryOp) and isinstance(claim.op, ast.Not):
        claim, wanted = claim.operand, False
    if isinstance(claim, ast.Call):
        # bool() of a plain value
        return _check(claim, wanted, lambda value, expected: bool(value) is expected)
    if not wanted or not isinstance(claim, ast.Compare) or len(claim.ops) != 1:
        return None
    left, operation, right = claim.left, type(claim.ops[0]), claim.comparators[0]
    if operation in (ast.Eq, ast.NotEq) and not isinstance(left, ast.Call):
        left, right = right, left
    if operation not in _COMPARISONS or not isinstance(left, ast.Call):
        return None
    try:
        expected = ast.literal_eval(right)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if operation in (ast.Is, ast.IsNot) and not (expected is None or isinstance(expected, bool)):
        return None
    return _check(left, expected, _COMPARISONS[operation])


def _check(call: ast.Call, expected: Any, holds: Callable[[Any, Any], bool]) -> Check | None:
    # what is true or false by a function of somebody else's would be decided by whoever patched it
    own = isinstance(call.func, ast.Name) and not hasattr(builtins, call.func.id)
    if (isinstance(expected, bool) and not own) or any(_decides(node) for node in ast.walk(call)):
        return None
    try:
        longest = 4096 + 8 * len(json.dumps(pack(expected)))
    except NotPlain:
        return None
    return Check(ast.unparse(call), expected, holds, longest)


def _decides(node: ast.AST) -> bool:
    """Whether a part of a call weighs what the candidate returned: abs(f(3) - 7) == 0 would tell what is expected, and
    leave the decision to whoever patched `abs`."""
    weighs = isinstance(node, ast.BinOp) and any(isinstance(part, ast.Call) for part in ast.walk(node))
    return weighs or isinstance(node, _DECIDING)


def _lines(done: Execution) -> dict[int, tuple[dict[str, Any], int]]:
    """What was written for each index, and how long it is. The candidate may have written any of it."""
    lines: dict[int, tuple[dict[str, Any], int]] = {}
    for raw in done.results.split(b"\n"):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("index"), int):
            lines[line["index"]] = (line, len(raw))
    return lines


def _against(check: Check, line: Mapping[str, Any], length: int) -> str | None:
    if "value" not in line:
        return f"raised {': '.join(map(str, line.get('error', ())))}"[:200]
    try:
        held = length <= check.longest and check.holds(unpack(line["value"]), check.expected)
    except (ValueError, TypeError, RecursionError):
        held = False
    return None if held else "wrong value"


def _missing(done: Execution) -> str:
    """Why a test has no result."""
    if done.timed_out:
        return "timed out"
    if done.output_exceeded:
        return "wrote too much"
    last = done.stderr.strip().rpartition("\n")[2]
    return f"the program ended first, exit code {done.exit_code}{': ' + last[:160] if last else ''}"
