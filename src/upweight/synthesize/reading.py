"""Reads problems back: a story to its steps, a statement to its program, by the phrasings that they were told in.

This is how the rule-based expert knows: it has the words of the domain, not the reference answer.
"""

import re
from functools import cache

from upweight.synthesize.pipelines import ENDINGS, KINDS, OPERATIONS, Kind, Program
from upweight.synthesize.stories import CLOSINGS, CONNECTIVES, DISTRACTORS, OPENINGS, PHRASES, Step, Story

_FIXED_OPERANDS = {"double": 2, "triple": 3, "half": 2}
_SENTENCE = re.compile(r"(?<=[.?]) ")
_CONNECTIVE = re.compile("^(?:" + "|".join(word for word in CONNECTIVES if word) + ")")


def read(question: str) -> Story | None:
    """The story that a question tells, None where a sentence is not one of the domain's."""
    sentences = _SENTENCE.split(" ".join(question.split()))
    if len(sentences) < 3 or not _any(CLOSINGS, sentences[-1]):
        return None
    opening = next((found for pattern in _patterns(OPENINGS) if (found := pattern.fullmatch(sentences[0]))), None)
    if opening is None:
        return None
    steps: list[Step] = []
    for sentence in sentences[1:-1]:
        step = _step(sentence)
        if step is not None:
            steps.append(step)
        elif not _any(DISTRACTORS, sentence):
            return None
    return Story(question, int(opening["n"]), tuple(steps)) if steps else None


def _step(sentence: str) -> Step | None:
    told = _CONNECTIVE.sub("", sentence)
    for operation, phrases in PHRASES.items():
        for pattern in _patterns(phrases):
            found = pattern.fullmatch(told)
            if found:
                return Step(operation, _FIXED_OPERANDS.get(operation) or int(found["n"]))
    return None


def _any(phrases: tuple[str, ...], sentence: str) -> bool:
    return any(pattern.fullmatch(sentence) for pattern in _patterns(phrases))


@cache
def _patterns(phrases: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Each phrasing as a pattern: {n} and {m} are numbers, other places words; the first letter in either case."""
    compiled = []
    for phrase in phrases:
        parts = re.split(r"\{(\w+)\}", phrase)
        texts = [re.escape(part) for part in parts[0::2]]
        places = [rf"(?P<{name}>\d+)" if name in ("n", "m") else r"[A-Za-z]+" for name in parts[1::2]]
        joined = "".join(text + place for text, place in zip(texts, [*places, ""], strict=True))
        if joined[0].isalpha():
            joined = f"[{joined[0].lower()}{joined[0].upper()}]{joined[1:]}"
        compiled.append(re.compile(joined))
    return tuple(compiled)


_STATEMENT = re.compile(r"Write f\((x|xs|s)\): (.+)\.")


def read_program(statement: str) -> Program | None:
    """The program that a statement asks for, None where a part of it is not one of the domain's."""
    found = _STATEMENT.fullmatch(" ".join(statement.split()))
    if found is None:
        return None
    kind: Kind = next(known for known in KINDS if known == found[1])
    known = (*OPERATIONS[kind], *ENDINGS[kind])
    pipeline = []
    for words in found[2].split(", then "):
        for operation in known:
            told = re.fullmatch(re.escape(operation.words).replace(r"\{k\}", r"(\d+)"), words)
            if told:
                pipeline.append((operation, int(told[1]) if told.groups() else operation.smallest))
                break
        else:
            return None
    return Program(kind, tuple(pipeline))
