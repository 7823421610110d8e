"""Programs: two derivations agree, tests tell wrong from right, statements are read back, reserved ones kept apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.synthesize import programs
from upweight.synthesize.pipelines import ENDINGS, OPERATIONS, Program, mutants, program, reserved
from upweight.synthesize.programs import ProgramDocuments, problem, wrong_solutions
from upweight.synthesize.reading import read_program
from upweight.synthesize.validation import flaw


@dataclass(frozen=True)
class InProcess(Verifier):
    """Runs code of ours in this process, which is enough for programs that no model wrote."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [self._run(problem, completion.text) for completion in group]

    def _run(self, problem: Problem, code: str) -> Verdict:
        space: dict[str, object] = {}
        try:
            exec(code, space)  # noqa: S102 - procedural code
            for test in problem.tests:
                exec(test, space)  # noqa: S102
        except (AssertionError, TypeError, ValueError, AttributeError) as error:
            return Verdict(0.0, type(error).__name__)
        return Verdict(1.0, "passed")


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
    verifier = InProcess()
    for index in range(400):
        made = program(1, index)
        posed = problem(made)
        assert len(posed.tests) == 8
        assert verifier.score(posed, [Completion((), (), made.solution, "end", "")])[0].score == 1, made.statement


def test_every_operation_is_right_alone() -> None:
    for kind in ("x", "xs", "s"):
        for operation in (*OPERATIONS[kind], *ENDINGS[kind]):
            for constant in {operation.smallest, operation.largest}:
                made = Program(kind, ((operation, constant),))
                posed = problem(made)
                assert InProcess().score(posed, [Completion((), (), made.solution, "end", "")])[0].score == 1


def test_a_problem_is_sound_only_where_wrong_programs_fail() -> None:
    square = OPERATIONS["x"][5]
    made = Program("x", ((square, 0),))
    posed = problem(made)
    assert flaw(posed, made.solution, wrong_solutions(made), InProcess()) is None
    # at least 9 and then at most 1 is always 1: "return 1" passes
    always = Program("x", ((OPERATIONS["x"][6], 9), (OPERATIONS["x"][7], 1)))
    found = flaw(problem(always), always.solution, wrong_solutions(always), InProcess())
    assert found is not None
    assert found.startswith("a wrong program passes")
    assert flaw(posed, "def f(x):\n    return x", (), InProcess()) == "the solution fails: AssertionError"
    assert flaw(Problem("p", posed.messages), made.solution, (), InProcess()) == "no tests"


def test_most_programs_are_sound() -> None:
    flaws = [flaw(problem(made), made.solution, wrong_solutions(made), InProcess()) for made in _made(200)]
    assert sum(found is None for found in flaws) > 150
    assert not any(found and found.startswith("the solution") for found in flaws)


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
