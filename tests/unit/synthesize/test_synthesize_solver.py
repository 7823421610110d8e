"""The rule-based solver writes steps that hold, and does not pretend to read what it cannot."""

import pytest

from upweight.core.protocols import Limits
from upweight.synthesize.solver import RuleBasedSolver, solve_equation, solve_legs, solve_sum


def test_sums_go_from_left_to_right() -> None:
    asked = "State the final answer to the following arithmetic problem: 967 + 921 - 1900 ="
    assert solve_sum(asked) == ("967 + 921 = 1888\n1888 - 1900 = -12", -12)
    assert solve_sum("State the final answer to the following arithmetic problem: 5 - 7 - 1 =") == (
        "5 - 7 = -2\n-2 - 1 = -3",
        -3,
    )


@pytest.mark.parametrize(
    ("equation", "steps", "answer"),
    [
        ("Solve for e: 56 - 98*e = -1218", "-98*e = -1218 - 56 = -1274\ne = -1274 / -98 = 13", 13),
        ("Solve for b: 4465*b = 178600", "4465*b = 178600\nb = 178600 / 4465 = 40", 40),
        ("Find the value of x in the equation: 3*x - 7*2 + 1 = 2", "3*x = 2 + 13 = 15\nx = 15 / 3 = 5", 5),
        ("Determine the value of k that satisfies: k + 1 = 4", "1*k = 4 - 1 = 3\nk = 3 / 1 = 3", 3),
    ],
)
def test_equations(equation: str, steps: str, answer: int) -> None:
    assert solve_equation(equation) == (steps, answer)


def test_legs() -> None:
    asked = "Now, how many legs are there in total if you have 13 woodlouses, 8 leechs, 2 butterflys, 1 bees?\n"
    steps, answer = solve_legs(asked) or ("", 0)
    assert answer == 13 * 14 + 0 + 12 + 6
    assert steps.splitlines()[-1] == "1 bees: 1 * 6 = 6, 194 + 6 = 200"


def test_what_it_cannot_read_it_does_not_answer() -> None:
    asked = ["What is the capital of France?", "Solve for x: x*x = 4", "how many legs if you have 3 unicorns?"]
    for (one,) in RuleBasedSolver().sample(asked, count=1, limits=Limits(8)):
        assert one.text == "I cannot read this problem."
    (answer,) = RuleBasedSolver().sample(["Solve for b: 2*b = 8"], count=2, limits=Limits(8))
    assert [one.text for one in answer] == ["<think>\n2*b = 8\nb = 8 / 2 = 4\n</think>\n<answer>4</answer>"] * 2
