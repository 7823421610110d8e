"""Code tests: right, wrong, malformed and hostile programs, against tests of both kinds."""

import time
from collections.abc import Iterator

import pytest

from upweight.core.errors import IsolationUnavailable, UserError
from upweight.core.records import Completion, Message, Problem
from upweight.rollout.sandbox import Sandbox, SandboxLimits
from upweight.verify.code_tests import CodeVerifier, program_of, taken_apart

QUICK = SandboxLimits(cpu_seconds=2.0, wall_seconds=2.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(QUICK, workers=2) as pool:
        try:
            pool.run("0")
        except IsolationUnavailable as error:
            pytest.skip(f"THE SANDBOX IS NOT TESTED HERE: {error}")
        yield pool


def completion(text: str, stop: str = "end") -> Completion:
    return Completion((1,), (), text, stop, "test")


def problem(*tests: str) -> Problem:
    return Problem("p", (Message("user", "Write f."),), tests=tests)


def scores(sandbox: Sandbox, tests: tuple[str, ...], *programs: str, partial: bool = False) -> list[float]:
    verifier = CodeVerifier(sandbox, partial=partial)
    return [verdict.score for verdict in verifier.score(problem(*tests), [completion(text) for text in programs])]


def test_right_and_wrong_programs(sandbox: Sandbox) -> None:
    tests = ("assert f(3) == 7", "assert f(0) == 1", "assert 9 == f(4)")
    right, wrong = "def f(x):\n    return 2 * x + 1", "def f(x):\n    return 7"
    assert scores(sandbox, tests, right, wrong) == [1.0, 0.0]
    # of the three tests, f(3) alone is 7
    assert scores(sandbox, tests, right, wrong, partial=True) == [1.0, 1 / 3]


def test_each_form_of_a_test_is_judged_as_python_would(sandbox: Sandbox) -> None:
    program = "def f(x):\n    return x"
    passing = (
        "assert f(1) == True",
        "assert f((1, 2)) == (1, 2)",
        "assert f({'a': [1.5, None]}) == {'a': [1.5, None]}",
        "assert f({1, 2}) == {2, 1}",
        "assert f(b'x') == b'x'",
        "assert f(10**30) == 1000000000000000000000000000000",
        "assert f(1)",
        "assert not f([])",
        "assert f(None) is None",
        "assert f(2) in (1, 2)",
        "assert f(2) != 3",
        "assert sorted(f([2, 1])) == [1, 2]",
        "for i in range(5):\n    assert f(i) == i",
        "import math\nassert math.isclose(f(0.1 + 0.2), 0.3)",
        "def check(candidate):\n    assert candidate(3) == 3\ncheck(f)",
        "values = [3, 1]\nassert f(values) == values",
        "try:\n    f()\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError('no error')",
        "assert isinstance(f(1), int)",
    )
    for test in passing:
        assert scores(sandbox, (test,), program) == [1.0], test
    failing = (
        "assert f((1, 2)) == [1, 2]",
        "assert f(1) == '1'",
        "assert f([])",
        "assert f(1) is None",
        "assert f(1) is True",
        "assert g(1) == 1",
        "assert f(1, 2) == 1",
        "for i in range(5):\n    assert f(i) == 0",
        "raise SystemExit(0)",
        "assert (",
    )
    for test in failing:
        assert scores(sandbox, (test,), program) == [0.0], test


def test_arguments_changed_in_place_are_seen_by_the_test(sandbox: Sandbox) -> None:
    test = "values = [3, 1, 2]\nassert f(values) is None\nassert values == [1, 2, 3]"
    assert scores(sandbox, (test,), "def f(x):\n    x.sort()", "def f(x):\n    return None") == [1.0, 0.0]


def test_objects_of_the_candidate_can_be_used_but_do_not_judge_themselves(sandbox: Sandbox) -> None:
    stack = (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n"
        "        self.items.append(x)\n    def pop(self):\n        return self.items.pop()\n"
        "    def __len__(self):\n        return len(self.items)\n    def __iter__(self):\n"
        "        return iter(self.items)\n"
    )
    test = (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert len(s) == 2\nassert list(s) == [1, 2]\nassert s.pop() == 2\n"
        "assert s.items == [1]"
    )
    assert scores(sandbox, (test,), stack) == [1.0]
    generator = "def f(n):\n    for i in range(n):\n        yield i"
    assert scores(sandbox, ("assert list(f(3)) == [0, 1, 2]",), generator) == [1.0]
    assert scores(sandbox, ("values = list(f(3))\nassert values == [0, 1, 2]",), generator) == [1.0]
    yes = (
        "class Yes:\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\n"
        "    def startswith(self, x): return True\n    def __contains__(self, x): return True\n"
        "def f(x):\n    return Yes()"
    )
    for test in (
        "assert f(3) == 7",
        "value = f(3)\nassert value == 7",
        "assert abs(f(3) - 7) < 1",
        "assert f(3).startswith('a')",
        "assert 7 in f(3)",
        "assert f(3) in (7,)",
        "assert f(3)",
    ):
        assert scores(sandbox, (test,), yes) == [0.0], test


def test_built_in_functions_of_a_test_are_pythons(sandbox: Sandbox) -> None:
    for program, test in (
        ("def abs(v): return 0\ndef f(x): return 0", "assert abs(f(3) - 7) < 1e-6"),
        ("import builtins\nbuiltins.abs = lambda v: 0\ndef f(x): return 0", "assert abs(f(3) - 7) == 0"),
        ("import builtins\nbuiltins.all = lambda v: True\ndef f(x): return [0]", "assert all(f(3)) is True"),
        ("range = lambda *a: []\ndef f(x): return 0", "for i in range(2):\n    assert f(i) == i + 1"),
        ("def f(x): return 0\ndef isinstance(*a): return True", "v = f(1)\nassert isinstance(v, str)"),
        ("int = type\ndef f(x): return 0", "v = f(1)\nassert type(v) != int"),
    ):
        assert scores(sandbox, (test,), program) == [0.0], program
    # a helper of the same name harms no test that does not use it, nor the tests that call it for what it is
    program = "def max(a, b):\n    return a if a > b else b\nsum = 0\ndef f(x):\n    return max(x, 3)"
    tests = (
        "for i in range(4):\n    assert f(i) == 3",
        "assert max(1, 2) == 2",
        'if __name__ == "__main__":\n    f(1)',
    )
    assert scores(sandbox, tests, program) == [1.0]


def test_large_tables_of_a_program_stay_with_it(sandbox: Sandbox) -> None:
    program = "table = list(range(2_000_000))\nsmall = [1]\ndef f(x):\n    return table[x]"
    assert scores(sandbox, ("value = f(3)\nassert value == 3\nassert small == [1]",), program) == [1.0]


def test_time_that_is_up_is_told_apart_whatever_the_form_of_the_test(sandbox: Sandbox) -> None:
    limits = SandboxLimits(cpu_seconds=1.0, wall_seconds=60.0)
    for test in ("assert f(3) == 7", "value = f(3)\nassert value == 7"):
        verdicts = CodeVerifier(sandbox, limits).score(
            problem(test, test), [completion("def f(x):\n    while x: pass"), completion("import os\nos._exit(0)")]
        )
        assert verdicts[0].reason == "failed 2 of 2 tests, number 1: timed out"
        assert "timed out" not in verdicts[1].reason
    swallowed = "try:\n    f(3)\nexcept Exception:\n    pass"
    assert scores(sandbox, (swallowed,), "import os\ndef f(x):\n    os._exit(0)") == [0.0]


def test_malformed_completions_score_nothing_and_say_why(sandbox: Sandbox) -> None:
    group = [
        completion("def f(x)"),
        completion("<think>never closed"),
        completion(""),
        completion("def f(x):\n    return 2", stop="length"),
        completion("I cannot."),
    ]
    verdicts = CodeVerifier(sandbox).score(problem("assert f(1) == 2"), group)
    assert [verdict.score for verdict in verdicts] == [0.0] * 5
    assert "SyntaxError" in verdicts[0].reason
    assert verdicts[1].reason == verdicts[2].reason == "no program found"
    assert verdicts[3].reason == "truncated"


def test_hostile_programs_lose(sandbox: Sandbox) -> None:
    claims = "".join(
        f'    os.write(3, b\'{{"index": {index}, "kind": "wrong", "failure": ""}}\\n\')\n' for index in range(2)
    )
    hostile = (
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "while True: pass",
        "print('x' * 10_000_000)\ndef f(x): return x",
        f"import os\ndef f(x):\n{claims}    return 0",
        "import builtins\nbuiltins.AssertionError = SystemExit\ndef f(x): raise SystemExit(0)",
        "import builtins\nbuiltins.range = lambda *a: []\ndef f(x): return 0",
        "import sys\ndef f(x):\n    for frame in [sys._getframe(2)]:\n        frame.f_locals['i'] = 0\n    return 0",
        "def f(x):\n    return '[' * 500_000",
    )
    simple, as_it_is = "assert f(3) == 7", "for i in range(1, 3):\n    assert f(i) == 2 * i + 1"
    for program in hostile:
        assert scores(sandbox, (simple,), program) == [0.0], program
        assert scores(sandbox, (as_it_is,), program) == [0.0], program


def test_expected_values_and_test_texts_stay_out_of_the_candidates_process() -> None:
    check = taken_apart("assert f(3) == 7")
    assert check is not None
    assert (check.call, check.expected) == ("f(3)", 7)
    # these would hand the decision, or the expected value, to the candidate's process
    for test in (
        *("assert abs(f(3) - 7) < 1", "assert abs(f(3) - 7) == 0", "assert (f(3) == 7) == True", "f(3)"),
        *("assert isinstance(f(3), int)", "assert isinstance(f(3), int) == True", "assert m.close(f(3), 7) is True"),
    ):
        assert taken_apart(test) is None
    # nor what cannot be compared as data
    for expected in ("...", "[" * 70 + "]" * 70):
        assert taken_apart(f"assert f(3) == {expected}") is None


@pytest.mark.parametrize("text", ["```" + "a" * 100_000, "``` " + " " * 100_000, "```\n" * 20_000])
def test_hostile_fences_cost_no_time(text: str) -> None:
    before = time.process_time()
    program_of(text)
    assert time.process_time() - before < 0.5


def test_program_of() -> None:
    assert program_of("Sure:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```\nDone.") == "x = 2\n"
    assert program_of("<think>```python\nx = 1\n```</think>\ndef f(): pass\n") == "def f(): pass"
    assert program_of("```json\n{}\n```") == "```json\n{}\n```"
    assert program_of("<think>") is None
    shows = "```python\ndef f():\n    return 3\n```\nIt prints\n```\n3\n```\n"
    assert program_of(shows) == "def f():\n    return 3\n"
    assert program_of("```\nx = 1\n```") == "x = 1\n"
    calls = shows + "and is called so:\n```python\nprint(f())\n```"
    assert program_of(calls) == "print(f())\n"
    assert program_of(calls, defines=("f",)) == "def f():\n    return 3\n"
    assert program_of(calls, defines=("g",)) == "print(f())\n"


def test_a_problem_without_tests_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match="has no tests"):
        CodeVerifier(sandbox).score(problem(), [completion("x")])
