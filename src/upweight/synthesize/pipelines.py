r"""Programs as pipelines: one argument and a few operations on it, each known in words, in Python and in meaning.

    add 3, then multiply by 2        (x + 3) * 2        lambda x: (x + 3) * 2

The argument is a number x, a list xs or a text s. Expected values come from the meanings, never from the Python, so
that running a solution against its tests compares two independent derivations.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from upweight.synthesize.stories import RESERVED_ONE_IN

Kind = Literal["x", "xs", "s"]
"""What the argument is, named as the argument is: a number, a list of numbers, a text."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a pipeline.

    Attributes:
        words: what the statement says; {k} is the constant.
        code: the Python expression; {v} is the value so far, {k} the constant.
        meaning: the function of (value, constant).
        smallest, largest: the range that the constant is drawn from; equal where there is none.
        binds: how tightly the expression holds together: 2 call or index, 1 product, 0 sum. An operand that holds less
            tightly than `needs` is put in parentheses.
    """

    words: str
    code: str
    meaning: Callable[[Any, int], Any]
    smallest: int = 0
    largest: int = 0
    binds: int = 2
    needs: int = 2


OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "x": (
        Operation("add {k}", "{v} + {k}", lambda v, k: v + k, 1, 9, binds=0, needs=0),
        Operation("subtract {k}", "{v} - {k}", lambda v, k: v - k, 1, 9, binds=0, needs=0),
        Operation("multiply by {k}", "{v} * {k}", lambda v, k: v * k, 2, 9, binds=1, needs=1),
        Operation("take the remainder by {k}", "{v} % {k}", lambda v, k: v % k, 3, 9, binds=1, needs=1),
        Operation("divide by {k} and round down", "{v} // {k}", lambda v, k: v // k, 2, 5, binds=1, needs=1),
        Operation("square it", "{v} ** 2", lambda v, k: v**2, binds=1),
        Operation("take at least {k}", "max({v}, {k})", lambda v, k: max(v, k), 1, 9, needs=0),
        Operation("take at most {k}", "min({v}, {k})", lambda v, k: min(v, k), 1, 9, needs=0),
    ),
    "xs": (
        Operation("keep the even ones", "[v for v in {v} if v % 2 == 0]", lambda v, k: [x for x in v if x % 2 == 0]),
        Operation("keep the odd ones", "[v for v in {v} if v % 2 == 1]", lambda v, k: [x for x in v if x % 2 == 1]),
        Operation("keep those over {k}", "[v for v in {v} if v > {k}]", lambda v, k: [x for x in v if x > k], 1, 9),
        Operation("keep those under {k}", "[v for v in {v} if v < {k}]", lambda v, k: [x for x in v if x < k], 3, 9),
        Operation("add {k} to each", "[v + {k} for v in {v}]", lambda v, k: [x + k for x in v], 1, 9),
        Operation("multiply each by {k}", "[v * {k} for v in {v}]", lambda v, k: [x * k for x in v], 2, 9),
        Operation("square each", "[v * v for v in {v}]", lambda v, k: [x * x for x in v]),
        Operation("sort them", "sorted({v})", lambda v, k: sorted(v), needs=0),
        Operation("reverse them", "{v}[::-1]", lambda v, k: v[::-1]),
        Operation("take the first {k}", "{v}[:{k}]", lambda v, k: v[:k], 2, 4),
    ),
    "s": (
        Operation("reverse it", "{v}[::-1]", lambda v, k: v[::-1]),
        Operation("put it in capitals", "{v}.upper()", lambda v, k: v.upper()),
        Operation("repeat it {k} times", "{v} * {k}", lambda v, k: v * k, 2, 5, binds=1, needs=1),
        Operation("take the first {k} letters", "{v}[:{k}]", lambda v, k: v[:k], 2, 5),
        Operation("drop the first {k} letters", "{v}[{k}:]", lambda v, k: v[k:], 2, 4),
        Operation("take the last {k} letters", "{v}[-{k}:]", lambda v, k: v[-k:], 2, 5),
        Operation("sort its letters", '"".join(sorted({v}))', lambda v, k: "".join(sorted(v)), needs=0),
    ),
}
"""Operations that keep the kind of the value."""

ENDINGS: dict[str, tuple[Operation, ...]] = {
    "x": (),
    "xs": (
        Operation("sum them", "sum({v})", lambda v, k: sum(v), needs=0),
        Operation("count them", "len({v})", lambda v, k: len(v), needs=0),
        Operation("take the largest or 0", "max({v}, default=0)", lambda v, k: max(v, default=0), needs=0),
        Operation("take the smallest or 0", "min({v}, default=0)", lambda v, k: min(v, default=0), needs=0),
    ),
    "s": (
        Operation("count its letters", "len({v})", lambda v, k: len(v), needs=0),
        Operation('count "a" in it', '{v}.count("a")', lambda v, k: v.count("a")),
        Operation('count "e" in it', '{v}.count("e")', lambda v, k: v.count("e")),
    ),
}
"""Operations that may only come last: they turn a list or a text into a number."""

KINDS: tuple[Kind, ...] = ("x", "x", "xs", "xs", "s")
_LETTERS = "abcdefgaeaernst"


@dataclass(frozen=True, slots=True)
class Program:
    """A problem and its solution. `pipeline` holds each operation with its constant."""

    kind: Kind
    pipeline: tuple[tuple[Operation, int], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Each operation in words."""
        return tuple(operation.words.format(k=constant) for operation, constant in self.pipeline)

    @property
    def statement(self) -> str:
        """The problem as it is put to a model: "Write f(x): add 3, then multiply by 2."."""
        return f"Write f({self.kind}): {', then '.join(self.words)}."

    @property
    def solution(self) -> str:
        """The reference solution, a function f of one argument."""
        return f"def f({self.kind}):\n    return {expression(self.kind, self.pipeline)}"

    @property
    def chain(self) -> str:
        """The steps towards the solution: the expression after each operation, one a line."""
        return "\n".join(expression(self.kind, self.pipeline[: end + 1]) for end in range(len(self.pipeline)))

    def value(self, argument: Any) -> Any:
        """What the solution returns, by the meanings of the operations."""
        value = argument
        for operation, constant in self.pipeline:
            value = operation.meaning(value, constant)
        return value


def expression(argument: str, pipeline: tuple[tuple[Operation, int], ...]) -> str:
    """The Python expression of a pipeline, with no more parentheses than it needs."""
    code, binds = argument, 2
    for operation, constant in pipeline:
        inner = code if binds >= operation.needs else f"({code})"
        code, binds = operation.code.format(v=inner, k=constant), operation.binds
    return code


def reserved(statement: str) -> bool:
    """Whether a statement belongs to the evaluation: one in sixteen, by the hash of its words. Never trained on."""
    words = " ".join(statement.split())
    return hashlib.sha256(words.encode()).digest()[0] % RESERVED_ONE_IN == 0


def program(seed: int, index: int, *, fewest_steps: int = 1, most_steps: int = 3, evaluation: bool = False) -> Program:
    """The program number `index` of the stream `seed`; arguments as in stories.story."""
    if not 1 <= fewest_steps <= most_steps:
        raise ValueError(f"{fewest_steps} to {most_steps} steps: expected 1 <= fewest_steps <= most_steps")
    random = Random((seed << 40) ^ index ^ (1 << 38))
    while True:
        drawn = _draw(random, fewest_steps + int(random.random() * (most_steps - fewest_steps + 1)))
        if reserved(drawn.statement) == evaluation:
            return drawn


def _draw(random: Random, length: int) -> Program:
    kind = KINDS[int(random.random() * len(KINDS))]
    operations = OPERATIONS[kind]
    pipeline: list[tuple[Operation, int]] = []
    while len(pipeline) < length:
        last = len(pipeline) == length - 1
        choices = ENDINGS[kind] if last and ENDINGS[kind] and random.random() < 0.7 else operations
        operation = choices[int(random.random() * len(choices))]
        if not pipeline or pipeline[-1][0] is not operation:
            pipeline.append((operation, _constant(operation, random)))
    return Program(kind, tuple(pipeline))


def _constant(operation: Operation, random: Random) -> int:
    return operation.smallest + int(random.random() * (operation.largest - operation.smallest + 1))


def arguments(kind: Kind, random: Random, count: int) -> list[Any]:
    """`count` different arguments to test with: small and larger ones, an empty one among lists and texts."""
    drawn: list[Any] = []
    while len(drawn) < count:
        argument: Any
        if kind == "x":
            wider = 1 + len(drawn) // 8  # so that among the small ones, too, one is left
            argument = int(random.random() * wider * (15 if len(drawn) % 2 else 60))
        elif kind == "xs":
            argument = [int(random.random() * 13) for _ in range(0 if len(drawn) == count - 1 else 4 + len(drawn))]
        else:
            size = 0 if len(drawn) == count - 1 else 4 + len(drawn)
            argument = "".join(_LETTERS[int(random.random() * len(_LETTERS))] for _ in range(size))
        if argument not in drawn:
            drawn.append(argument)
    return drawn


def mutants(made: Program, random: Random) -> tuple[Program, ...]:
    """Wrong programs near this one: a constant moved by one, an operation exchanged, the last operation left out."""
    found = []
    at = int(random.random() * len(made.pipeline))
    operation, constant = made.pipeline[at]
    others = [other for other in (*OPERATIONS[made.kind], *ENDINGS[made.kind]) if other is not operation]
    if operation.smallest < operation.largest:
        moved = constant + 1 if constant < operation.largest else constant - 1
        found.append(_with(made, at, (operation, moved)))
    if at == len(made.pipeline) - 1 or not ENDINGS[made.kind]:
        other = others[int(random.random() * len(others))]
        found.append(_with(made, at, (other, _constant(other, random))))
    if len(made.pipeline) > 1:
        found.append(replace(made, pipeline=made.pipeline[:-1]))
    return tuple(found)


def _with(made: Program, at: int, part: tuple[Operation, int]) -> Program:
    return replace(made, pipeline=(*made.pipeline[:at], part, *made.pipeline[at + 1 :]))
