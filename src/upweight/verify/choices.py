r"""Multiple choice: the letter that a completion settles on.

The answer is found as everywhere (the last \boxed{...}, or "the answer is"); of it only the letter in front counts, so
"B", "(B)", "B. 10 m" and "\text{B) 10 m}" are one answer. A small letter counts where no word follows it: "a mixture"
chooses nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.verify.answers import extract, shown
from upweight.verify.exact import tidy

_LETTER = re.compile(
    r"(?i:option |choice )[(\[*]*([A-Za-z])(?![A-Za-z])|[(\[*]*(?:([A-Z])(?![A-Za-z])|([a-z])(?! ?\w))"
)


def chosen_letter(answer: str) -> str | None:
    """The letter that stands in front of an answer, in upper case; None where none does."""
    found = _LETTER.match(tidy(answer))
    return next(filter(None, found.groups())).upper() if found else None


@dataclass(frozen=True, slots=True)
class ChoiceVerifier(Verifier):
    """1 for the right letter, else 0. The reason is "right", "wrong: chose ...", "no answer found" or "truncated"."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if problem.answer is None or not re.fullmatch("[A-Z]", problem.answer):
            raise UserError(f"problem {problem.id}: its answer is {problem.answer!r}, not the letter of an option")
        return [_judge(problem.answer, completion) for completion in group]

    def answer_of(self, text: str) -> str | None:
        answer = extract(text)
        return None if answer is None else chosen_letter(answer)


def _judge(right: str, completion: Completion) -> Verdict:
    if completion.truncated:
        return Verdict(0.0, "truncated")
    answer = extract(completion.text)
    letter = None if answer is None else chosen_letter(answer)
    if letter is None:
        return Verdict(0.0, "no answer found" if answer is None else f"no letter found: got {shown(answer)}")
    return Verdict(1.0, "right") if letter == right else Verdict(0.0, f"wrong: chose {letter}")
