r"""Procedural mathematics: short stories of several steps, with a worked chain and an exact answer.

    Mia has 14 pens. Then she buys 23 more. Tom is 12 years old. She gives 5 to Tom. How many pens does Mia have now?
    14+23=37. 37-5=32.
    \boxed{32}

Every value on the way is an integer in 0-50, one quantity runs through the story, and sentences that do not matter
stand between those that do. A story is a function of (seed, index) alone. A sixteenth of all questions, chosen by
hash, is reserved for evaluation: what is made for training never draws one of them (see `reserved`).

The phrasings are data (`PHRASES`), so that stories can be read back as well as told: see solve.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from upweight.core.records import Conversation, Document, Message, Problem
from upweight.text.template import CHATML, render_text

LARGEST_VALUE = 50
LARGEST_START = 30
SMALLEST_RANGE = 8
LARGEST_OPERAND = 12
RESERVED_ONE_IN = 16

WORKED = "story-worked"
DAMAGED = "story-damaged"
DIALOGUE = "story-dialogue"

NAMES = ("Mia", "Ana", "Sue", "Eva", "Kim", "Joy", "Amy", "Liz", "Tom", "Ben", "Max", "Leo", "Sam", "Dan", "Jim", "Bob")
SHE = frozenset(NAMES[:8])
OBJECTS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cups",
    "eggs",
    "keys",
    "nuts",
    "pens",
    "pears",
    "plants",
    "rings",
    "rocks",
    "shells",
    "stamps",
    "toys",
)

PHRASES: dict[str, tuple[str, ...]] = {
    "+": (
        "{who} buys {n} more.",
        "{who} finds {n} more.",
        "{who} gets {n} from {friend}.",
        "{friend} brings {n} more {things}.",
        "{n} more {things} are added.",
    ),
    "-": (
        "{who} gives {n} to {friend}.",
        "{who} loses {n} of them.",
        "{who} sells {n} {things}.",
        "{friend} takes {n} of them.",
        "{n} of the {things} are lost.",
    ),
    "double": ("the number doubles.", "{who} has twice as many.", "{who} doubles the {things}."),
    "triple": ("the number triples.", "{who} has three times as many."),
    "times": ("{who} has {n} times as many.", "the number is multiplied by {n}."),
    "half": ("{who} gives half of them away.", "half of the {things} are lost.", "{who} keeps only half of them."),
}
OPENINGS = ("{name} has {n} {things}.", "{name} starts with {n} {things}.", "{name} owns {n} {things}.")
CONNECTIVES = ("", "", "Then ", "Later ", "Next ")
DISTRACTORS = (
    "It is a sunny day.",
    "{friend} likes music.",
    "{friend} is {m} years old.",
    "The shop closes at {m}.",
    "{friend} has {m} {others}.",
    "The bus is late.",
    "{friend} walks home.",
    "It costs {m} cents to park.",
)
CLOSINGS = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have at the end?",
    "What is the number of {things} at the end?",
)

SIGNS = {"+": "+", "-": "-", "double": "*", "triple": "*", "times": "*", "half": "/"}
OPERATIONS = ("+", "+", "+", "-", "-", "-", "double", "double", "triple", "times", "half", "half")
"""Operations by how often they are drawn; one that would leave 1-50 is drawn again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the quantity: `operation` is a key of PHRASES, `operand` the number (2 for double and half)."""

    operation: str
    operand: int

    def apply(self, value: int) -> int:
        """The quantity after this step."""
        if self.operation == "+":
            return value + self.operand
        if self.operation == "-":
            return value - self.operand
        return value // self.operand if self.operation == "half" else value * self.operand


@dataclass(frozen=True, slots=True)
class Story:
    """A word problem. `start` and `steps` are what it tells; everything else follows from them."""

    question: str
    start: int
    steps: tuple[Step, ...]

    @property
    def chain(self) -> str:
        """The worked steps: "14+23=37. 37-5=32."."""
        return chain_of(self.start, self.steps)

    @property
    def answer(self) -> str:
        """The last value, as digits."""
        value = self.start
        for step in self.steps:
            value = step.apply(value)
        return str(value)


def chain_of(start: int, steps: tuple[Step, ...]) -> str:
    """The steps worked out from `start`, one short equation each."""
    parts, value = [], start
    for step in steps:
        result = step.apply(value)
        parts.append(f"{value}{SIGNS[step.operation]}{step.operand}={result}.")
        value = result
    return " ".join(parts)


def reserved(question: str) -> bool:
    """Whether a question belongs to the evaluation: one in sixteen, by the hash of its words. Never trained on."""
    words = " ".join(question.split())
    return hashlib.sha256(words.encode()).digest()[0] % RESERVED_ONE_IN == 0


def story(
    seed: int,
    index: int,
    *,
    fewest_steps: int = 2,
    most_steps: int = 5,
    largest_value: int = LARGEST_VALUE,
    evaluation: bool = False,
) -> Story:
    """The story number `index` of the stream `seed`.

    Args:
        seed: the stream; different seeds give different stories.
        index: the place within the stream, 0 or above.
        fewest_steps, most_steps: the number of steps is drawn evenly between these.
        largest_value: no value on the way exceeds it; at least 8.
        evaluation: True draws reserved questions only, False never draws one.
    """
    if not 1 <= fewest_steps <= most_steps:
        raise ValueError(f"{fewest_steps} to {most_steps} steps: expected 1 <= fewest_steps <= most_steps")
    if largest_value < SMALLEST_RANGE:
        raise ValueError(f"largest_value is {largest_value}: stories need values up to {SMALLEST_RANGE} at least")
    random = Random((seed << 40) ^ index)
    while True:
        length = fewest_steps + int(random.random() * (most_steps - fewest_steps + 1))
        drawn = _draw(random, length, largest_value)
        if reserved(drawn.question) == evaluation:
            return drawn


def _draw(random: Random, length: int, largest_value: int) -> Story:
    draw = random.random  # the only source of chance: its sequence is the same in every version of Python
    name = NAMES[int(draw() * len(NAMES))]
    friend = NAMES[(NAMES.index(name) + 1 + int(draw() * (len(NAMES) - 1))) % len(NAMES)]
    things = OBJECTS[int(draw() * len(OBJECTS))]
    others = OBJECTS[(OBJECTS.index(things) + 1 + int(draw() * (len(OBJECTS) - 1))) % len(OBJECTS)]
    pronoun = "she" if name in SHE else "he"
    start = value = 2 + int(draw() * (min(LARGEST_START, largest_value) - 1))
    steps, sentences = [], []
    opening = OPENINGS[int(draw() * len(OPENINGS))].format(name=name, n=start, things=things)
    for _ in range(length):
        step = _draw_step(random, value, largest_value)
        value = step.apply(value)
        steps.append(step)
        phrases = PHRASES[step.operation]
        phrase = phrases[int(draw() * len(phrases))].format(
            who=name if draw() < 0.3 else pronoun, friend=friend, n=step.operand, things=things
        )
        connective = CONNECTIVES[int(draw() * len(CONNECTIVES))]
        sentences.append(connective + phrase if connective else phrase[0].upper() + phrase[1:])
    for _ in range(int(draw() * (3 if length < 5 else 2))):
        distractor = DISTRACTORS[int(draw() * len(DISTRACTORS))].format(
            friend=friend, m=2 + int(draw() * 28), others=others
        )
        sentences.insert(int(draw() * (len(sentences) + 1)), distractor)
    closing = CLOSINGS[int(draw() * len(CLOSINGS))].format(name=name, things=things)
    return Story(" ".join([opening, *sentences, closing]), start, tuple(steps))


def _draw_step(random: Random, value: int, largest_value: int) -> Step:
    draw = random.random
    while True:
        operation = OPERATIONS[int(draw() * len(OPERATIONS))]
        if operation == "+":
            most = min(LARGEST_OPERAND, largest_value - value)
            if most >= 2:
                return Step("+", 2 + int(draw() * (most - 1)))
        elif operation == "-":
            most = min(LARGEST_OPERAND, value - 1)
            if most >= 2:
                return Step("-", 2 + int(draw() * (most - 1)))
        elif operation == "half":
            if value % 2 == 0 and value >= 4:
                return Step("half", 2)
        else:
            operand = {"double": 2, "triple": 3}.get(operation) or 4 + int(draw() * 2)
            if value >= 2 and value * operand <= largest_value:
                return Step(operation, operand)


# ---------------------------------------------------------------------------------------------------------------------
# Renderings


def answer_text(chain: str, answer: str) -> str:
    r"""What a base checkpoint writes below a question: the chain, then "\boxed{answer}" on a line of its own."""
    return f"{chain}\n\\boxed{{{answer}}}"


def worked(told: Story) -> str:
    """The document of the corpus: question, newline, chain, newline, boxed answer. text/chat.py's PLAIN matches it."""
    return f"{told.question}\n{answer_text(told.chain, told.answer)}"


def thought(chain: str, answer: str) -> str:
    r"""An assistant turn: the chain between <think> and </think>, then "\boxed{answer}"."""
    return f"<think>\n{chain}\n</think>\n\\boxed{{{answer}}}"


def conversation(told: Story, source: str = "story") -> Conversation:
    """The story as a question and a worked answer to imitate."""
    turns = (Message("user", told.question), Message("assistant", thought(told.chain, told.answer)))
    return Conversation(turns, source)


def dialogue(talk: Conversation) -> str:
    """A conversation as the text that the chat template makes of it, for the corpus."""
    return render_text(CHATML, talk.messages).rstrip("\n")


def problem(told: Story, source: str = "story") -> Problem:
    """The story as a question with a reference answer, named by the hash of the question."""
    name = hashlib.sha256(told.question.encode()).hexdigest()[:16]
    return Problem(name, (Message("user", told.question),), answer=told.answer, source=source)


def damaged(told: Story, random: Random) -> str:
    """A document that a filter should drop: one of five kinds of damage, drawn evenly."""
    return DAMAGES[int(random.random() * len(DAMAGES))](told, random)


def wrong_chain(told: Story, random: Random) -> tuple[str, str]:
    """A chain that goes wrong at one step and goes on from there: (chain, answer), the answer never the right one."""
    at = int(random.random() * len(told.steps))
    while True:
        parts, value = [], told.start
        for number, step in enumerate(told.steps):
            result = step.apply(value)
            if number == at:
                result = max(0, result + (1 + int(random.random() * 9)) * (1 if random.random() < 0.5 else -1))
            parts.append(f"{value}{SIGNS[step.operation]}{step.operand}={result}.")
            value = result
        if str(value) != told.answer:
            return " ".join(parts), str(value)
        at = len(told.steps) - 1  # the error vanished on the way (halved down): put it into the last step


def _wrong(told: Story, random: Random) -> str:
    return f"{told.question}\n{answer_text(*wrong_chain(told, random))}"


def _bare(told: Story, random: Random) -> str:
    return f"{told.question}\n\\boxed{{{told.answer}}}"


def _garbled(told: Story, random: Random) -> str:
    characters = list(worked(told))
    for _ in range(len(characters) // 6):
        characters[int(random.random() * len(characters))] = chr(33 + int(random.random() * 94))
    return "".join(characters)


def _repeated(told: Story, random: Random) -> str:
    line = told.question.split(". ")[int(random.random() * 2)] + "."
    return "\n".join([told.question] + [line] * (3 + int(random.random() * 6)))


def _truncated(told: Story, random: Random) -> str:
    text = worked(told)
    return text[: int(len(text) * (0.25 + 0.45 * random.random()))]


DAMAGES = (_wrong, _bare, _garbled, _repeated, _truncated)


def check_shares(count: int, damaged_share: float, dialogue_share: float) -> None:
    """Raises ValueError where a source could not be made up so."""
    if count < 0 or min(damaged_share, dialogue_share) < 0 or damaged_share + dialogue_share > 1:
        raise ValueError(
            f"{count} documents, {damaged_share} damaged, {dialogue_share} dialogues: expected a count of 0 or more "
            "and shares that sum to 1 at most"
        )


@dataclass(frozen=True)
class StoryDocuments:
    """A source of documents like any reader: worked stories, damaged ones, and worked ones told as a conversation.

    Their sources are "story-worked", "story-damaged" and "story-dialogue". Conversations are the synthetic question and
    answer data of the report's decay phase: the text of the chat template, trained on as a whole.

    Attributes:
        count: documents in all.
        seed: the stream of stories.
        damaged_share, dialogue_share: which shares of the documents are damaged and conversations, 0-1.
        fewest_steps, most_steps, largest_value: of each story.
    """

    count: int
    seed: int = 0
    damaged_share: float = 0.3
    dialogue_share: float = 0.0
    fewest_steps: int = 2
    most_steps: int = 5
    largest_value: int = LARGEST_VALUE

    def __post_init__(self) -> None:
        check_shares(self.count, self.damaged_share, self.dialogue_share)

    def documents(self) -> Iterator[Document]:
        """The documents in their fixed order; no reserved question is among them."""
        for index in range(self.count):
            told = story(
                self.seed,
                index,
                fewest_steps=self.fewest_steps,
                most_steps=self.most_steps,
                largest_value=self.largest_value,
            )
            chance = Random((self.seed << 40) ^ index ^ (1 << 39))
            kind = chance.random()
            if kind < self.damaged_share:
                yield Document.of(damaged(told, chance), DAMAGED)
            elif kind < self.damaged_share + self.dialogue_share:
                yield Document.of(dialogue(conversation(told)), DIALOGUE)
            else:
                yield Document.of(worked(told), WORKED)
