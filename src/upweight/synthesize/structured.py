"""Asks a model for answers of a certain form: read, and asked for again with the reason where they cannot be read.

A single answer that stays unreadable is returned as such, with its last text; where more than a tolerated share of them
stays unreadable, the model cannot play the part, and that is an error which shows an answer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler
from upweight.core.records import Message
from upweight.verify.answers import visible_part

Value = TypeVar("Value")
SHOWN_CHARACTERS = 400


class FormError(ValueError):
    """An answer is not of the form asked for; the message says why, and is shown to the model."""


class NeverInForm(UserError):
    """A model does not answer in the form that its part asks for."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What was asked of models: calls, characters read and written, tokens written (0 where they are not counted)."""

    calls: int = 0
    characters_read: int = 0
    characters_written: int = 0
    tokens_written: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.calls + other.calls,
            self.characters_read + other.characters_read,
            self.characters_written + other.characters_written,
            self.tokens_written + other.tokens_written,
        )


@dataclass(frozen=True, slots=True)
class Reply(Generic[Value]):
    """What came of asking. `value` is None where no answer could be read; then `why` tells about the last one.

    Attributes:
        text: the last answer as it was written.
        policy: who wrote it.
        attempts: how often it was asked.
    """

    value: Value | None
    text: str
    why: str
    policy: str
    attempts: int
    cost: Cost


@dataclass(frozen=True)
class Asking:
    """How to ask.

    Attributes:
        limits: how to decode; each attempt draws anew.
        attempts: answers asked for, at most.
        unreadable_share: which share of a batch may stay unreadable before the model is refused its part, 0-1.
    """

    limits: Limits = Limits(max_new_tokens=2048, temperature=0.7)  # noqa: RUF009 - frozen
    attempts: int = 3
    unreadable_share: float = 0.1

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.unreadable_share <= 1:
            raise UserError(
                f"attempts is {self.attempts} and unreadable_share {self.unreadable_share}: expected at least one "
                "attempt and a share in 0-1"
            )


def ask(
    sampler: Sampler,
    prompts: Sequence[str],
    parsers: Sequence[Callable[[str], Value]],
    asking: Asking,
    *,
    part: str,
) -> list[Reply[Value]]:
    """One reply a prompt, all prompts of an attempt in one call of the sampler.

    Args:
        parsers: one a prompt: the value of an answer's text (its thought removed), or FormError.
        part: what the model is asked to be, for the error.

    Raises NeverInForm where more than the tolerated share of replies stays unreadable.
    """
    talks: list[tuple[Message, ...]] = [(Message("user", prompt),) for prompt in prompts]
    replies: list[Reply[Value] | None] = [None] * len(prompts)
    waiting = list(range(len(prompts)))
    for attempt in range(1, asking.attempts + 1):
        limits = replace(asking.limits, seed=asking.limits.seed + attempt - 1)
        groups = sampler.sample([talks[index] for index in waiting], count=1, limits=limits) if waiting else []
        failed = []
        for index, group in zip(waiting, groups, strict=True):
            answer = group[0]
            earlier = replies[index]
            cost = Cost(1, sum(len(turn.content) for turn in talks[index]), len(answer.text), len(answer.tokens)) + (
                earlier.cost if earlier else Cost()
            )
            try:
                value = parsers[index](visible_part(answer.text) or "")
                replies[index] = Reply(value, answer.text, "", answer.policy, attempt, cost)
            except FormError as error:
                replies[index] = Reply(None, answer.text, str(error), answer.policy, attempt, cost)
                talks[index] = (
                    talks[index][0],
                    Message("assistant", answer.text),
                    Message(
                        "user", f"This answer cannot be used: {error}. Answer again in exactly the form asked for."
                    ),
                )
                failed.append(index)
        waiting = failed
    made = [reply for reply in replies if reply is not None]
    unreadable = [reply for reply in made if reply.value is None]
    if len(unreadable) > asking.unreadable_share * len(made):
        last = unreadable[-1]
        raise NeverInForm(
            f"{last.policy or 'the model'} cannot be the {part}: {len(unreadable)} of {len(made)} answers were not in "
            f"form after {last.attempts} attempts ({last.why}). Its last answer: "
            f"{last.text[:SHOWN_CHARACTERS]!r}. Give this part to a stronger model, or make its prompt simpler"
        )
    return made


def json_object(text: str) -> Mapping[str, Any]:
    """The first JSON object of `text`, whatever stands around it. Raises FormError."""
    start = text.find("{")
    if start < 0:
        raise FormError("it holds no JSON object")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except ValueError as error:
        raise FormError(f"its JSON does not parse ({error})") from None
    if not isinstance(value, dict):
        raise FormError("its JSON is no object")
    return value


def between(tag: str) -> Callable[[str], str]:
    """A parser for the text between <tag> and </tag>, the last such where there are several."""

    def parse(text: str) -> str:
        before, closed, _ = text.rpartition(f"</{tag}>")
        _, opened, inside = before.rpartition(f"<{tag}>")
        if not closed or not opened or not inside.strip():
            raise FormError(f"nothing stands between <{tag}> and </{tag}>")
        return inside.strip()

    return parse
