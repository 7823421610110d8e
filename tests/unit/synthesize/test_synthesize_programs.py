"""Programs: two derivations agree, tests tell wrong from right, statements are read back, reserved ones kept apart."""

from collections.abc import Sequence
from random import Random

from upweight.core.records import Problem
from upweight.rollout.sandbox import Sandbox
from upweight.synthesize import programs
from upweight.synthesize.pipelines import ENDINGS, KINDS, OPERATIONS, Program, arguments, mutants, program, reserved
from upweight.synthesize.programs import ProgramDocuments, problem, wrong_solutions
from upweight.synthesize.reading import read_program
from upweight.synthesize.validation import Posed, flaws, sandboxed


def in_process(work: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[str]]:
    """Runs code of ours in this process, which is enough for programs that no model wrote."""
    return [[_failure(program, tests) for program in programs] for programs, tests in work]


def _failure(code: str, tests: Sequence[str]) -> str:
    space: dict[str, object] = {}
    try:
        exec(code, space)  # noqa: S102 - procedural code
        for test in tests:
            exec(test, space)  # noqa: S102
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        return type(error).__name__
    return ""


def flaw(problem: Problem, solution: str, wrong: tuple[str, ...]) -> str | None:
    return flaws([Posed(problem, solution, wrong)], in_process)[0]


def test_a_program_by_hand() -> None:
    add, multiply = OPERATIONS["x"][0], OPERATIONS["x"][2]
    made = Program("x", ((add, 3), (multiply, 2)))
    assert made.statement == "Write f(x): add 3, then multiply by 2."
    assert made.solution == "def f(x):\n    return (x + 3) * 2"
    assert made.chain == "x + 3\n(x + 3) * 2"
    assert made.value(4) == 14  # (4 + 3) x 2
    # the other way round no parentheses are needed
    assert Program("x", ((multiply, 2), (add, 3))).solution.endswith("return x * 2 + 3")


def test_solutions_return_what_their_operations_mean() -> None:
    for index in range(400):
        made = program(1, index)
        posed = problem(made)
        assert len(posed.tests) == 8
        assert flaw(posed, made.solution, ()) is None, made.statement


def test_there_are_arguments_for_any_number_of_tests() -> None:
    for kind in KINDS:
        drawn = arguments(kind, Random(1), 200)
        assert len({repr(one) for one in drawn}) == 200
    # what eight tests or fewer take stays what it was
    assert arguments("x", Random(1), 4) == [8, 12, 45, 3]


def test_every_operation_is_right_alone() -> None:
    for kind in ("x", "xs", "s"):
        for operation in (*OPERATIONS[kind], *ENDINGS[kind]):
            for constant in {operation.smallest, operation.largest}:
                made = Program(kind, ((operation, constant),))
                assert flaw(problem(made), made.solution, ()) is None


def test_a_problem_is_sound_only_where_wrong_programs_fail() -> None:
    square = OPERATIONS["x"][5]
    made = Program("x", ((square, 0),))
    posed = problem(made)
    assert flaw(posed, made.solution, wrong_solutions(made)) is None
    # at least 9 and then at most 1 is always 1: "return 1" passes
    always = Program("x", ((OPERATIONS["x"][6], 9), (OPERATIONS["x"][7], 1)))
    found = flaw(problem(always), always.solution, wrong_solutions(always))
    assert found is not None
    assert found.startswith("a wrong program passes")
    assert flaw(posed, "def f(x):\n    return x", ()) == "the solution fails: AssertionError"
    assert flaw(Problem("p", posed.messages), made.solution, ()) == "no tests"


def test_tests_that_depend_on_chance_are_found() -> None:
    # the second run of the same solution fails
    found = flaws([Posed(problem(program(0, 0)), "", ())], lambda work: [["", "AssertionError"]])
    assert found == ["the solution fails: AssertionError"]


def test_the_sandbox_finds_the_same_as_this_process() -> None:
    posed = [Posed(problem(made), made.solution, wrong_solutions(made)) for made in _made(60)]
    with Sandbox(workers=1) as sandbox:
        found = flaws(posed, sandboxed(sandbox))
    assert found == flaws(posed, in_process)
    assert any(found)


def test_most_programs_are_sound() -> None:
    found = flaws([Posed(problem(made), made.solution, wrong_solutions(made)) for made in _made(200)], in_process)
    assert sum(one is None for one in found) > 150
    assert not any(one and one.startswith("the solution") for one in found)


def test_mutants_differ() -> None:
    for index, made in enumerate(_made(200)):
        assert all(mutant.solution != made.solution for mutant in mutants(made, Random(index)))


def test_statements_are_read_back() -> None:
    for made in _made(500):
        assert read_program(made.statement) == made
    assert read_program("Write f(x): fly to the moon.") is None
    assert read_program("Sort a list.") is None


def test_reserved_statements_are_kept_apart() -> None:
    assert not any(reserved(made.statement) for made in _made(1000))
    assert all(reserved(program(0, index, evaluation=True).statement) for index in range(50))


def test_documents_hold_worked_and_damaged_programs() -> None:
    made = list(ProgramDocuments(300, seed=4).documents())
    assert made == list(ProgramDocuments(300, seed=4).documents())
    assert {document.source for document in made} == {programs.WORKED, programs.DAMAGED}
    for document in made:
        if document.source == programs.WORKED:
            statement, _, solution = document.text.partition("\n")
            read = read_program(statement)
            assert read is not None
            assert read.solution == solution


def _made(count: int) -> list[Program]:
    return [program(0, index) for index in range(count)]
