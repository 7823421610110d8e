"""Rewards put together: a weighted sum, and rewards for form and for length to put into one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.verify.answers import extract, visible_part


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of a sum. `name` leads its reason."""

    name: str
    verifier: Verifier
    weight: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"part {self.name!r} weighs {self.weight}: a weight is a finite number")


@dataclass(frozen=True, slots=True)
class WeightedVerifier(Verifier):
    """sum of weight x score over the parts. Weights that add up to 1 keep the reward in 0-1.

    `only_if_right` names a part without whose score above 0 the others earn nothing, so that form is never paid for
    alone.
    """

    parts: tuple[Part, ...]
    only_if_right: str | None = None

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"parts {names}: expected at least one, each with a name of its own")
        if self.only_if_right is not None and self.only_if_right not in names:
            raise ValueError(f"only_if_right is {self.only_if_right!r}, which is none of the parts {names}")

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        columns = [part.verifier.score(problem, group) for part in self.parts]
        return [self._sum(verdicts) for verdicts in zip(*columns, strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        named = list(zip(self.parts, verdicts, strict=True))
        closed = any(part.name == self.only_if_right and verdict.score <= 0 for part, verdict in named)
        counted = [(part, verdict) for part, verdict in named if not closed or part.name == self.only_if_right]
        total = math.fsum(part.weight * verdict.score for part, verdict in counted)
        reasons = "; ".join(f"{part.name} {verdict.score:g} ({verdict.reason})" for part, verdict in named)
        return Verdict(total, reasons)


@dataclass(frozen=True, slots=True)
class FormatVerifier(Verifier):
    """1 for a completion that ended by itself, with one thought at its start, closed, and an answer after it.

    Attributes:
        thought: whether a thought is expected; without it, any tag of one is a fault.
        answer: whether an answer has to be found (a box, or "the answer is"), beyond some text.
    """

    thought: bool = True
    answer: bool = True

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        faults = [self._fault(completion) for completion in group]
        return [Verdict(1.0, "well formed") if fault is None else Verdict(0.0, fault) for fault in faults]

    def _fault(self, completion: Completion) -> str | None:
        if completion.truncated:
            return "truncated"
        text = completion.text
        # A chat template may open the thought in the prompt: then the completion only closes it.
        opened = text.lstrip().startswith("<think>")
        if text.count("</think>") != int(self.thought) or text.count("<think>") != int(opened and self.thought):
            return "expected one thought at the start, closed" if self.thought else "a thought where none is expected"
        visible = visible_part(text)
        if visible is None or not visible.strip():
            return "nothing after the thought"
        if self.answer and extract(text) is None:
            return "no answer found"
        return None


@dataclass(frozen=True, slots=True)
class LengthVerifier(Verifier):
    """1 up to `free_tokens`, then falling linearly to 0 at `most_tokens`: DAPO's soft overlong punishment, shifted to
    0-1 (Yu et al. 2025, equation 13). A truncated completion is 0."""

    free_tokens: int
    most_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.free_tokens < self.most_tokens:
            raise ValueError(
                f"free_tokens is {self.free_tokens} and most_tokens {self.most_tokens}: expected 0 <= free < most"
            )

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [self._judge(completion) for completion in group]

    def _judge(self, completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        count = len(completion.tokens)
        left = (self.most_tokens - count) / (self.most_tokens - self.free_tokens)
        return Verdict(min(1.0, max(0.0, left)), f"{count} tokens")


@dataclass(frozen=True)
class BudgetVerifier(Verifier):
    """Another verifier's score, less for a completion that is longer than its problem takes.

        score x max(least, 1 - max(0, tokens / usual - slack) / span)

    `usual` is what right answers to that problem take: the median length of those that the gate saw, as the successors
    of the report do (arXiv 2602.13367 and after). Problems without one keep their score.

    Attributes:
        usual: tokens by the problem's id.
        slack: how many times the usual length costs nothing.
        span: how many more times take the score down to 0.
        least: the share of the score that is left to the longest.
    """

    verifier: Verifier
    usual: Mapping[str, float]
    slack: float = 1.5
    span: float = 1.5
    least: float = 0.0

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        verdicts = self.verifier.score(problem, group)
        usual = self.usual.get(problem.id)
        if not usual:
            return verdicts
        return [self._shortened(*judged, usual) for judged in zip(group, verdicts, strict=True)]

    def _shortened(self, completion: Completion, verdict: Verdict, usual: float) -> Verdict:
        times = len(completion.tokens) / usual
        share = max(self.least, 1.0 - max(0.0, times - self.slack) / self.span)
        if share >= 1.0 or verdict.score <= 0.0:
            return verdict  # a penalty does not shrink with length
        return Verdict(
            verdict.score * share, f"{verdict.reason}; {times:.1f} times the usual length, {share:.2f} of it"
        )
