import pytest

from upweight.curate.arithmetic import Arithmetic, arithmetic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40 + 9 = 49. Then 49 + 5 = 56.", Arithmetic(1, 1, 1)),  # 49 + 5 is 54
        ("14+23=37. 37-5=32.\n\\boxed{32}", Arithmetic(2, 0, 1)),
        ("2 + 3 * 4 = 14, 2 * 3 + 4 = 10", Arithmetic(2, 0, 0)),  # products before sums
        ("10 / 4 = 2.5 and 10 ÷ 3 = 3.33 but 10 / 3 = 3.34", Arithmetic(2, 1, 0)),  # rounded to the digits shown
        ("$3 × 4 = $12.", Arithmetic(1, 0, 0)),
        ("5 / 0 = 3", Arithmetic(0, 1, 0)),
        ("3 − 5 = -2", Arithmetic(1, 0, 0)),
    ],
)
def test_equations_are_checked(text: str, expected: Arithmetic) -> None:
    assert arithmetic(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x + 4 + 5 = 12",
        "3 + 4 = 7x",
        "a1 + 2 = 4",
        "2^3 + 1 = 4",
        "(2) + 2 = 5",
        "1 + 1 = 2 = 2",
        "y = 3",
        "no equation",
    ],
)
def test_parts_of_something_longer_are_left_alone(text: str) -> None:
    assert arithmetic(text) == Arithmetic(0, 0, 0)
