"""A rule-based solver for three families of reasoning-gym: it writes out the steps and the answer, as a teacher would.

    chain_sum          967 + 921 - 30          967 + 921 = 1888; 1888 - 30 = 1858
    simple_equations   56 - 98*e = -1218       -98*e = -1218 - 56 = -1274; e = -1274 / -98 = 13
    leg_counting       13 leeches, 8 tigers    13 * 0 = 0; 8 * 4 = 32; 0 + 32 = 32

It is given the question alone, and says of any other that it cannot read it. What it writes is verified like the
answers of any model.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion

POLICY = "rule-based solver"
LEGS = {
    0: "snake, sea slug, jellyfish, flatworm, leech",
    2: "chicken, bird, human, duck",
    4: "dog, cat, cow, horse, lion, elephant, giraffe, tiger, deer, sheep",
    5: "starfish",
    6: "insect, ant, butterfly, beetle, bee, wasp, grasshopper, cricket, cockroach, praying mantis, firefly",
    8: "spider, scorpion",
    10: "crab, lobster, shrimp",
    14: "woodlouse",
}
_LEGS = {name: legs for legs, names in LEGS.items() for name in names.split(", ")}
_SUM = re.compile(r"arithmetic problem: ([-+\d ]+)=")
_EQUATION = re.compile(r"\b([a-z])(?: in the equation| that satisfies)?: ([-+*\da-z ]+) = (-?\d+)")
_ANIMALS = re.compile(r"if you have (.+)\?")


@dataclass(frozen=True)
class RuleBasedSolver(Sampler):
    """Solves problems of the three families, the steps between <think> and </think>, the answer in its tags."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """The same answer `count` times: rules have no temperature."""
        return [[Completion((), (), self._answer(prompt), "end", POLICY)] * count for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        question = prompt if isinstance(prompt, str) else prompt[-1].content
        for solve in SOLVERS:
            solved = solve(question)
            if solved is not None:
                steps, answer = solved
                return f"<think>\n{steps}\n</think>\n<answer>{answer}</answer>"
        return "I cannot read this problem."


Solved = tuple[str, int]
"""The steps, one a line, and the answer."""


def solve_sum(question: str) -> Solved | None:
    """A chain of additions and subtractions, from left to right."""
    found = _SUM.search(question)
    if found is None:
        return None
    first, *rest = re.findall(r"[-+]? ?\d+", found[1])
    value, steps = int(first.replace(" ", "")), []
    for term in rest:
        number = int(term.replace(" ", ""))
        sign = "-" if number < 0 else "+"
        steps.append(f"{value} {sign} {abs(number)} = {value + number}")
        value += number
    return "\n".join(steps) or str(value), value


def solve_equation(question: str) -> Solved | None:
    """A linear equation in one unknown with a whole solution."""
    found = _EQUATION.search(question)
    if found is None:
        return None
    name, left, right = found[1], found[2].strip(), int(found[3])
    try:
        tree = ast.parse(left, mode="eval").body
        constant, slope = _value(tree, name, 0), _value(tree, name, 1) - _value(tree, name, 0)
    except (SyntaxError, ValueError):
        return None
    rest = right - constant
    if not slope or rest % slope or _value(tree, name, 2) != constant + 2 * slope:  # not linear
        return None
    steps = [f"{slope}*{name} = {right}"]
    if constant:
        steps = [f"{slope}*{name} = {right} {'-' if constant > 0 else '+'} {abs(constant)} = {rest}"]
    return "\n".join([*steps, f"{name} = {rest} / {slope} = {rest // slope}"]), rest // slope


def _value(node: ast.expr, name: str, value: int) -> int:
    """The value of a polynomial at `value`. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=known) if known == name:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, name, value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, name, value) + _value(right, name, value)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left, name, value) - _value(right, name, value)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, name, value) * _value(right, name, value)
        case _:
            raise ValueError("no polynomial")


def solve_legs(question: str) -> Solved | None:
    """Animals and how many there are of each."""
    found = _ANIMALS.search(question)
    if found is None or "legs" not in question:
        return None
    total = 0
    steps: list[str] = []
    for item in found[1].split(", "):
        number, _, animal = item.partition(" ")
        legs = next((_LEGS[name] for name in (animal, animal[:-1], animal[:-2]) if name in _LEGS), None)
        if legs is None or not number.isdigit():
            return None
        product = int(number) * legs
        step = f"{number} {animal}: {number} * {legs} = {product}"
        steps.append(f"{step}, {total} + {product} = {total + product}" if steps else step)
        total += product
    return "\n".join(steps), total


SOLVERS: tuple[Callable[[str], Solved | None], ...] = (solve_sum, solve_equation, solve_legs)
