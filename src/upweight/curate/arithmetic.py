"""Equations between numbers in a text, and whether they hold: "49 + 5 = 56" does not.

What no count of characters sees, and a reader sees at once. Only plain equations count: numbers joined by + - * / (and
their typographic forms) on the left, one number on the right, nothing symbolic next to either side.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_SIGN = r"[-+*/×÷·−]"
_EQUATION = re.compile(
    rf"(?<![\w.])(?P<left>{_NUMBER}(?:\s*{_SIGN}\s*{_NUMBER}){{1,8}})\s{{0,3}}=\s{{0,3}}\$?(?P<right>-?{_NUMBER})(?![\w^(\[]|[.,]\d)"
)
_ANY = re.compile(r"\d\s{0,3}=\s{0,3}\$?-?\d")
_TERM = re.compile(rf"({_SIGN})\s*({_NUMBER})")
_NEIGHBOURS = frozenset("+-*/×÷·−^=)")


class Equation(NamedTuple):
    """One equation: its first number, what is said to come out, and whether it does."""

    first: float
    right: float
    holds: bool


class Arithmetic(NamedTuple):
    """The equations of a text: how many hold, how many do not, how many start from the result of the one before."""

    right: int
    wrong: int
    carried: int


def equations(text: str) -> Iterator[Equation]:
    """The plain equations of a text, in order."""
    if not _ANY.search(text):
        return
    for match in _EQUATION.finditer(text):
        before = text[max(0, match.start() - 3) : match.start()].rstrip()
        after = text[match.end() : match.end() + 3].lstrip()
        if before[-1:] in _NEIGHBOURS or after[:1] in _NEIGHBOURS:
            continue  # a part of something longer
        numbers = re.findall(_NUMBER, match["left"])
        found = _value(float(numbers[0]), _TERM.findall(match["left"]))
        right = float(match["right"])
        decimals = len(match["right"].partition(".")[2])
        within = 0.5 * 10.0**-decimals if decimals else 0.0  # the result may be rounded to the digits it shows
        yield Equation(float(numbers[0]), right, found is not None and abs(found - right) <= within + 1e-9)


def _value(first: float, terms: list[tuple[str, str]]) -> float | None:
    """first, then each sign and number: products before sums. None where something is divided by zero."""
    total, product = 0.0, first
    for sign, number in terms:
        if sign in "*×·":
            product *= float(number)
        elif sign in "/÷":
            if float(number) == 0:
                return None
            product /= float(number)
        else:
            total, product = total + product, float(number) if sign == "+" else -float(number)
    return total + product


def arithmetic(text: str) -> Arithmetic:
    """The equations of a text, counted."""
    right = wrong = carried = 0
    last: float | None = None
    for equation in equations(text):
        right, wrong = right + equation.holds, wrong + (not equation.holds)
        carried += equation.first == last
        last = equation.right
    return Arithmetic(right, wrong, carried)
