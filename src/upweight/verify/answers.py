r"""Reference answers: find the answer that a completion gives, and compare it by meaning.

The answer is the last \boxed{...}, or what follows the last "the answer is" or "Answer:". Numbers are compared exactly
and at once (exact.py), everything else by math-verify in a killable process (symbolic.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.verify.exact import LONGEST_ANSWER, number, same, tidy
from upweight.verify.symbolic import Outcome, compare_expressions
from upweight.verify.units import quantity, same_quantity

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\[{}\\]|[{}]")
_SAID = re.compile(
    r"\banswer[\s*_]{0,8}(?:is\b|:|=)[\s*_:]{0,8}(?:(?:\\\[|\$\$)[ \t]{0,8}\n\s{0,8})?|####[ \t]{0,8}", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_CHOICE = re.compile(r"\(?([A-Z])[).]?")
_CHOSEN = re.compile(r"\(?([A-Z])[).:] \S.*")
_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9 ,.:'’-]*[A-Za-z]{2}[A-Za-z0-9 ,.:'’-]*")
_ALLELES = re.compile(r"(?i:([a-z])\1)+")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]{1,2})\}?")
_SET = re.compile(r"\\?\{[^{}]*,[^{}]*\}")
_ORDERED = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_LONGEST_SHOWN = 80


def visible_part(text: str) -> str | None:
    """What follows the thought: all of a text without <think>, None where a thought was begun and never closed."""
    _, closed, after = text.rpartition("</think>")
    return None if "<think>" in after else after if closed else text


def extract(text: str) -> str | None:
    r"""The answer that `text` gives outside of its thought, None where it gives none. Linear in the text's length.

    The last closed \boxed{...} counts, its braces balanced, the innermost where boxes are nested; without any box, the
    rest of the sentence after the last "answer is", "answer:" or "####", which may begin on the next line, in a
    displayed formula too.
    """
    visible = visible_part(text)
    if visible is None:
        return None
    boxed = _last_box(visible)
    if boxed is not None:
        return boxed.strip() or None
    said = None
    for said in _SAID.finditer(visible):  # noqa: B007 - the last match is wanted
        pass
    if said is None:
        return None
    rest = visible[said.end() : said.end() + LONGEST_ANSWER]
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip(" \t*") or None


def compare(candidate: str, reference: str, *, cpu_seconds: int = 3) -> Outcome:
    """Whether two answers mean the same; "timed out" where the comparison exceeded its processor time or memory.

    Texts beyond 1,000 characters are different from everything but themselves.
    """
    if len(candidate) > LONGEST_ANSWER or len(reference) > LONGEST_ANSWER:
        return "equal" if candidate.strip() == reference.strip() else "different"
    decided = decided_by_rule(candidate, reference)
    if decided is not None:
        return "equal" if decided else "different"
    return compare_expressions(tidy(candidate), tidy(reference), cpu_seconds)


def decided_by_rule(candidate: str, reference: str) -> bool | None:
    """Whether two short answers are equal: for numbers, words and choices of a letter; None for other expressions."""
    candidate, reference = tidy(candidate), tidy(reference)
    if candidate == reference or not candidate or not reference:
        return bool(candidate) and candidate == reference
    known, given = number(reference), number(candidate)
    if known is not None and given is not None:
        return same(given, known)
    alike = same_quantity(candidate, reference)
    if alike is not None:
        return alike
    asked, chosen = _CHOICE.fullmatch(reference), _CHOICE.fullmatch(candidate) or _CHOSEN.fullmatch(candidate)
    if asked and chosen:
        return asked.group(1) == chosen.group(1)
    one, other = _BASED.fullmatch(candidate), _BASED.fullmatch(reference)
    if one and other and one.group(2) != other.group(2):
        values = [_in_base(*found.groups()) for found in (one, other)]
        return None not in values and values[0] == values[1]
    if _SET.fullmatch(candidate) and _ORDERED.fullmatch(reference):
        return False
    if _ORDERED.fullmatch(candidate) and _SET.fullmatch(reference):
        return False
    one_word = candidate.casefold() == reference.casefold()
    if one_word and _ALLELES.fullmatch(reference):  # Yes is YES, but AaBb is not aabb
        return False
    if one_word and _TEXT.fullmatch(reference):
        return True
    if _WORDS.fullmatch(reference) and _WORDS.fullmatch(candidate):
        if one_word:
            return True
        # two letters may be a product: ab is ba
        return False if min(len(candidate), len(reference)) > 2 else None
    if given is not None and _WORDS.fullmatch(reference):
        return False
    if known is not None and _WORDS.fullmatch(candidate):
        return False
    return None


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base)) if int(base) else None
    except ValueError:  # a digit that the base does not have, or a base that there is not
        return None


def equivalent(candidate: str, reference: str) -> bool:
    """Whether two answers mean the same. One that cannot be compared within the limits does not."""
    return compare(candidate, reference) == "equal"


@dataclass(frozen=True, slots=True)
class AnswerVerifier(Verifier):
    """1 for an answer equivalent to the problem's, else 0. A truncated completion is 0 whatever it says.

    The reason is "equal", "different: got ...", "no answer found", "truncated" or "timed out: got ...".
    """

    cpu_seconds: int = 3

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if problem.answer is None:
            raise UserError(
                f"problem {problem.id} (source {problem.source!r}) has no reference answer: give it one, or judge it "
                "by its tests or by preference"
            )
        return [self._judge(problem.answer, completion) for completion in group]

    def answer_of(self, text: str) -> str | None:
        """Numbers in lowest terms and without their unit, everything else tidied: 1/2, 0.5 and \\frac{1}{2} are one
        answer, and so are 18 and 18 eggs."""
        answer = extract(text)
        known = None if answer is None else quantity(tidy(answer))
        if answer is None or known is None:
            return None if answer is None else tidy(answer)
        share = Fraction(known.number.numerator, known.number.denominator)
        return f"{share}%" if known.number.percent else str(share)

    def _judge(self, reference: str, completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        answer = extract(completion.text)
        if answer is None:
            return Verdict(0.0, "no answer found")
        outcome = compare(answer, reference, cpu_seconds=self.cpu_seconds)
        if outcome == "equal":
            return Verdict(1.0, "equal")
        return Verdict(0.0, f"{outcome}: got {shown(answer)}")


def shown(answer: str) -> str:
    """`answer` in one line of at most 80 characters, for a reason."""
    line = " ".join(answer[: 4 * _LONGEST_SHOWN].split())
    return line if len(line) <= _LONGEST_SHOWN else line[: _LONGEST_SHOWN - 3] + "..."


def tally(verdicts: Iterable[Verdict]) -> Mapping[str, int]:
    """How often each kind of reason was given (what stands before its colon), so that time-outs show apart."""
    return Counter(verdict.reason.partition(":")[0] for verdict in verdicts)


def _last_box(text: str) -> str | None:
    """The contents of the closed box that was opened last."""
    open_braces: list[int] = []  # where the contents of a box start, -1 for any other brace
    best = (-1, -1)
    for found in _BRACES.finditer(text):
        token = found.group()
        if token == "}":
            start = open_braces.pop() if open_braces else -1
            if start > best[0]:
                best = (start, found.start())
        elif token[-1] == "{" and token != "\\{":
            open_braces.append(found.end() if token[0] == "\\" else -1)
    return text[best[0] : best[1]] if best[0] >= 0 else None
