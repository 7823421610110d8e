"""Chain reconstruction: heavy editing breaks the reasoning, so a new chain is written that leads to the solution.

    problem + solution -> summary -> chain          training target: chain as the thought, then the solution

Source: Nanbeige4-3B (arXiv 2512.06266). Writers of summaries and chains are Samplers. A chain is kept only if its own
answer is the solution's, it does not repeat the instructions given to its writer, and its length is within bounds.

Users without a strong model train one: `completion_examples` turns traces that are right already into conversations
that teach to write the chain from problem and solution.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.protocols import Sampler
from upweight.core.records import Conversation, Message, Problem
from upweight.synthesize.prompts import fill, read_prompt, require
from upweight.synthesize.refine import question_of, solution_of
from upweight.synthesize.structured import Asking, Cost, ask, between
from upweight.synthesize.trail import Refined, Trail
from upweight.verify.answers import equivalent, extract

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"</?(?:think|solution|summary|chain|outline|problem)>|<\|")


@dataclass(frozen=True)
class Prompts:
    """The texts that the writers are asked with; each has the places named in its default."""

    summary: str = field(default_factory=partial(read_prompt, "summary"))
    chain: str = field(default_factory=partial(read_prompt, "chain"))

    def __post_init__(self) -> None:
        require("summary", self.summary, "problem", "solution")
        require("chain", self.chain, "problem", "solution")

    @classmethod
    def of(cls, folder: str | Path) -> "Prompts":
        """The prompts of a folder (summary.md, chain.md), each as shipped where it is not there."""
        return cls(*(read_prompt(name, folder) for name in ("summary", "chain")))


@dataclass(frozen=True)
class Bounds:
    """What a chain has to keep to.

    Attributes:
        shortest_characters, longest_characters: of the chain.
        quoted_words: so many words in a row from the writer's instructions drop it.
        telltales: phrases, in small letters, that speak of the task and not of the problem.
    """

    shortest_characters: int = 5
    longest_characters: int = 20_000
    quoted_words: int = 8
    telltales: tuple[str, ...] = (
        "the given solution",
        "the provided solution",
        "the solution given",
        "the outline",
        "the summary",
        "chain of thought",
        "as instructed",
    )

    def __post_init__(self) -> None:
        if not 0 < self.shortest_characters <= self.longest_characters or self.quoted_words < 2:
            raise UserError(
                f"chains of {self.shortest_characters} to {self.longest_characters} characters, {self.quoted_words} "
                "quoted words: expected 0 < shortest <= longest and at least two words"
            )


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """A chain that was written for a solution. `fault` is empty where it may be imitated, else why it may not."""

    problem: Problem
    solution: str
    summary: str
    chain: str
    fault: str
    detail: str
    author: str
    cost: Cost

    def conversation(self, source: str) -> Conversation:
        """The training target: the conversation so far, then the chain as the thought and the solution."""
        answer = f"<think>\n{self.chain}\n</think>\n{self.solution}"
        return Conversation((*self.problem.messages, Message("assistant", answer)), source)


def reconstruct(
    refined: Sequence[Refined],
    summariser: Sampler,
    completer: Sampler,
    *,
    asking: Asking,
    bounds: Bounds,
    prompts: Prompts,
) -> list[Reconstructed]:
    """A chain for each refined solution, in order, with what is wrong with it. Raises NeverInForm."""
    questions = [question_of(one.problem) for one in refined]
    outlines = ask(
        summariser,
        [
            fill(prompts.summary, problem=question, solution=one.solution)
            for question, one in zip(questions, refined, strict=True)
        ],
        [between("summary")] * len(refined),
        asking,
        part="writer of summaries",
    )
    chains = ask(
        completer,
        [
            fill(prompts.chain, problem=question, solution=one.solution, summary=outline.value or "")
            for question, one, outline in zip(questions, refined, outlines, strict=True)
        ],
        [between("chain")] * len(refined),
        asking,
        part="writer of chains",
    )
    made = []
    for one, outline, chain in zip(refined, outlines, chains, strict=True):
        if chain.value is None or outline.value is None:
            fault, detail = "not in form", chain.why or outline.why
        else:
            fault, detail = fault_of(chain.value, one, bounds, prompts)
        made.append(
            Reconstructed(
                one.problem,
                one.solution,
                outline.value or "",
                chain.value or "",
                fault,
                detail,
                chain.policy,
                outline.cost + chain.cost,
            )
        )
    return made


def unwritten(refined: Refined) -> Reconstructed:
    """The solution behind the thought of the draft that it descends from, which no longer leads to it where the draft
    was wrong: what reconstruction is there to mend."""
    fault = "" if refined.thought else "no thought"
    return Reconstructed(refined.problem, refined.solution, "", refined.thought, fault, "", refined.author, Cost())


def unrefined(trail: Trail) -> Reconstructed:
    """The first draft as it was sampled, right or wrong."""
    draft = trail.candidates[0]
    fault = "no thought" if not draft.thought else "never ended" if not draft.text else ""
    return Reconstructed(trail.problem, draft.text, "", draft.thought, fault, "", draft.author, Cost())


def fault_of(chain: str, refined: Refined, bounds: Bounds, prompts: Prompts) -> tuple[str, str]:
    """Why a chain may not be imitated, and the evidence; two empty strings where it may."""
    if len(chain) < bounds.shortest_characters:
        return "too short", f"{len(chain)} characters"
    if len(chain) > bounds.longest_characters:
        return "too long", f"{len(chain)} characters"
    tag = _TAG.search(chain)
    if tag:
        return "holds a tag", tag.group()
    lowered = chain.lower()
    for phrase in bounds.telltales:
        if phrase in lowered and phrase not in question_of(refined.problem).lower():
            return "speaks of the task", phrase
    known = f"{question_of(refined.problem)}\n{refined.solution}"
    quoted = quotation(chain, f"{prompts.summary}\n{prompts.chain}", known, bounds.quoted_words)
    if quoted:
        return "quotes the instructions", quoted
    if refined.problem.answer is not None:
        wanted = extract(refined.solution) or last_number(refined.solution) or refined.solution.strip()
        given = conclusion(chain)
        if given is None:
            return "no answer", chain[-80:]
        if not equivalent(given, wanted):
            return "another answer", f"the chain ends in {given}, the solution in {wanted}"
    return "", ""


def conclusion(chain: str) -> str | None:
    """The chain's own answer: what it says in a box or as its answer, otherwise its last number."""
    return extract(chain) or last_number(chain)


def last_number(text: str) -> str | None:
    """The last number that is written in `text`, a sentence's full stop left off."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def quotation(text: str, instructions: str, known: str, words: int) -> str:
    """The first run of `words` words that `text` takes from the instructions and not from what it may know; or ""."""
    runs = _runs(instructions, words) - _runs(known, words)
    tokens = [found.group().lower() for found in _WORD.finditer(text)]
    for start in range(len(tokens) - words + 1):
        run = tuple(tokens[start : start + words])
        if run in runs:
            return " ".join(run)
    return ""


def _runs(text: str, words: int) -> set[tuple[str, ...]]:
    tokens = [found.group().lower() for found in _WORD.finditer(text)]
    return {tuple(tokens[start : start + words]) for start in range(len(tokens) - words + 1)}


def completion_examples(conversations: Iterable[Conversation], *, prompt: str | None = None) -> Iterator[Conversation]:
    """Conversations that teach to write a chain from problem and solution, from traces that are right already.

    Args:
        conversations: their last turn an assistant's with a closed thought; others are passed over.
        prompt: how the writer will be asked; by default the short form, for small models. A place {{summary}} is
            filled with the first and the last sentence of the thought.
    """
    asked = read_prompt("chain_short") if prompt is None else prompt
    for talk in conversations:
        answer = talk.messages[-1].content
        before, closed, solution = answer.rpartition("</think>")
        chain = before.partition("<think>")[2].strip()
        if not closed or not chain or not solution.strip():
            continue
        question = question_of(Problem("", talk.messages[:-1]))
        text = fill(asked, problem=question, solution=solution_of(answer), summary=_outline(chain))
        yield Conversation(
            (Message("user", text.strip()), Message("assistant", f"<chain>\n{chain}\n</chain>")), "chain-completion"
        )


def _outline(chain: str) -> str:
    sentences = re.split(r"(?<=[.!?])\s+|\n", chain)
    return sentences[0] if len(sentences) == 1 else f"{sentences[0]} ... {sentences[-1]}"
