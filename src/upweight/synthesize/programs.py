r"""Small coding problems built backwards: first a solution and what it returns, then tests, then the statement.

    Write f(x): add 3, then multiply by 2.
    def f(x):
        return (x + 3) * 2

A program is a function of (seed, index) alone; statements are reserved for evaluation by hash, as stories are. Whether
the tests tell right from wrong is found out by running them: see validation.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from upweight.core.records import Conversation, Document, Message, Problem
from upweight.synthesize.pipelines import Program, arguments, mutants, program
from upweight.synthesize.stories import check_shares, dialogue

WORKED = "code-worked"
DAMAGED = "code-damaged"
DIALOGUE = "code-dialogue"


def worked(made: Program) -> str:
    """The document of the corpus: statement, newline, solution."""
    return f"{made.statement}\n{made.solution}"


def answer_text(made: Program) -> str:
    """What a base checkpoint writes below a statement: the solution."""
    return made.solution


def conversation(made: Program, source: str = "code") -> Conversation:
    """The program as a question and an answer to imitate: the steps thought, then the solution."""
    content = f"<think>\n{made.chain}\n</think>\n{made.solution}"
    return Conversation((Message("user", made.statement), Message("assistant", content)), source)


def problem(made: Program, *, tests: int = 8, source: str = "code") -> Problem:
    """The program as a question with hidden tests, named by the hash of the statement."""
    return Problem(
        id=hashlib.sha256(made.statement.encode()).hexdigest()[:16],
        messages=(Message("user", made.statement),),
        tests=tuple(f"assert f({argument!r}) == {made.value(argument)!r}" for argument in _arguments(made, tests)),
        source=source,
    )


def wrong_solutions(made: Program, *, tests: int = 8) -> tuple[str, ...]:
    """Programs that no test set may let pass: near misses, the argument itself, nothing, the first expected value."""
    first = made.value(_arguments(made, tests)[0])
    trivial = [f"def f({made.kind}):\n    return {code}" for code in (made.kind, "None", repr(first))]
    near = [mutant.solution for mutant in mutants(made, _chance(made))]
    return tuple(dict.fromkeys(near + trivial))


def _arguments(made: Program, tests: int) -> list[object]:
    return arguments(made.kind, _chance(made), tests)


def _chance(made: Program) -> Random:
    return Random(int(hashlib.sha256(made.statement.encode()).hexdigest()[:12], 16))


def damaged(made: Program, random: Random) -> str:
    """A document that a filter should drop: a wrong, garbled, cut-off or repeated solution."""
    kind = int(random.random() * 4)
    if kind == 0:
        wrong = mutants(made, random)
        return f"{made.statement}\n{(wrong[0] if wrong else replace(made, pipeline=made.pipeline * 2)).solution}"
    text = worked(made)
    if kind == 1:
        characters = list(text)
        for _ in range(len(characters) // 6):
            characters[int(random.random() * len(characters))] = chr(33 + int(random.random() * 94))
        return "".join(characters)
    if kind == 2:
        return text[: int(len(text) * (0.3 + 0.4 * random.random()))]
    return "\n".join([made.statement] * (3 + int(random.random() * 5)))


@dataclass(frozen=True)
class ProgramDocuments:
    """A source of documents like any reader: worked programs, damaged ones, and worked ones told as a conversation.

    Their sources are "code-worked", "code-damaged" and "code-dialogue"; see stories.StoryDocuments.

    Attributes:
        count: documents in all. The domain is finite: some statements come more than once.
        seed: the stream of programs.
        damaged_share, dialogue_share: which shares of the documents are damaged and conversations, 0-1.
        fewest_steps, most_steps: operations of each program.
    """

    count: int
    seed: int = 0
    damaged_share: float = 0.3
    dialogue_share: float = 0.0
    fewest_steps: int = 1
    most_steps: int = 3

    def __post_init__(self) -> None:
        check_shares(self.count, self.damaged_share, self.dialogue_share)

    def documents(self) -> Iterator[Document]:
        """The documents in their fixed order; no reserved statement is among them."""
        for index in range(self.count):
            made = program(self.seed, index, fewest_steps=self.fewest_steps, most_steps=self.most_steps)
            chance = Random((self.seed << 40) ^ index ^ (1 << 37))
            kind = chance.random()
            if kind < self.damaged_share:
                yield Document.of(damaged(made, chance), DAMAGED)
            elif kind < self.damaged_share + self.dialogue_share:
                yield Document.of(dialogue(conversation(made)), DIALOGUE)
            else:
                yield Document.of(worked(made), WORKED)
