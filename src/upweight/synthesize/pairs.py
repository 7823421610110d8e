"""Distillation pairs: positives from a teacher, negatives from the student itself, kept only where clearly apart.

Of all combinations of a problem's completions that pass the rules, those closest in length are taken: a pair that is
right and long against wrong and short teaches length. What is dropped is counted by the rule that dropped it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Pair, Problem, Verdict
from upweight.verify.compose import FormatVerifier


@dataclass(frozen=True)
class PairRules:
    """When a pair is clear.

    Attributes:
        margin: by how much the positive's score has to exceed the negative's.
        lowest_positive: the score that a positive needs.
        pairs_per_problem: at most so many, no completion twice.
        longest_ratio: the longer of the two may have at most so many times the tokens of the shorter.
        truncated_negatives: whether a negative may have been cut off at the length limit.
        thought: whether a positive has to open with one thought, closed (else it may hold none).
    """

    margin: float = 0.5
    lowest_positive: float = 1.0
    pairs_per_problem: int = 1
    longest_ratio: float = 2.0
    truncated_negatives: bool = False
    thought: bool = True

    def __post_init__(self) -> None:
        if self.margin <= 0 or self.pairs_per_problem < 1 or self.longest_ratio < 1:
            raise UserError(
                f"margin {self.margin}, {self.pairs_per_problem} pairs a problem, longest_ratio {self.longest_ratio}: "
                "expected a margin above 0, at least one pair, a ratio of at least 1"
            )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The completions of one problem by teacher and student, each with its verdict."""

    problem: Problem
    teacher: tuple[Completion, ...]
    teacher_verdicts: tuple[Verdict, ...]
    student: tuple[Completion, ...]
    student_verdicts: tuple[Verdict, ...]


def judge(
    problem: Problem, teacher: Sequence[Completion], student: Sequence[Completion], verifier: Verifier
) -> Candidates:
    """All completions of a problem scored as one group, so that relative rewards compare teacher with student."""
    verdicts = verifier.score(problem, [*teacher, *student])
    split = len(teacher)
    return Candidates(problem, tuple(teacher), tuple(verdicts[:split]), tuple(student), tuple(verdicts[split:]))


def pairs_of(found: Candidates, rules: PairRules) -> list[Pair] | str:
    """The pairs of one problem, closest in length first; or the rule by which there is none."""
    positives = [
        (completion, verdict.score)
        for completion, verdict in zip(found.teacher, found.teacher_verdicts, strict=True)
        if verdict.score >= rules.lowest_positive and not completion.truncated and completion.tokens
    ]
    if not positives:
        return "the teacher is never right"
    form = FormatVerifier(thought=rules.thought, answer=False)
    formed = form.score(found.problem, [completion for completion, _ in positives])
    positives = [positive for positive, verdict in zip(positives, formed, strict=True) if verdict.score >= 1]
    if not positives:
        return "the teacher is right, but never in form"
    negatives = [
        (completion, verdict.score)
        for completion, verdict in zip(found.student, found.student_verdicts, strict=True)
        if completion.tokens and (rules.truncated_negatives or not completion.truncated)
    ]
    if not negatives:
        return "every student completion is truncated or empty"
    apart = [
        (good, bad)
        for good, score in positives
        for bad, lower in negatives
        if score - lower >= rules.margin and good.tokens != bad.tokens
    ]
    if not apart:
        return "the student is not clearly worse"
    fitting = [pair for pair in apart if _ratio(*pair) <= rules.longest_ratio]
    if not fitting:
        return "too different in length"
    fitting.sort(key=lambda pair: (_ratio(*pair), pair[0].tokens, pair[1].tokens))
    chosen: list[Pair] = []
    used: set[tuple[str, tuple[int, ...]]] = set()
    for good, bad in fitting:
        keys = {("teacher", good.tokens), ("student", bad.tokens)}
        if len(chosen) < rules.pairs_per_problem and not keys & used:
            chosen.append(Pair(found.problem, good, bad))
            used |= keys
    return chosen


def statistics(candidates: Sequence[Candidates], pairs: Sequence[Pair], dropped: Sequence[str]) -> Mapping[str, object]:
    """What went in and out: shares that are right, problems dropped by rule, and whether length gives pairs away."""
    teacher = [verdict.score for found in candidates for verdict in found.teacher_verdicts]
    student = [verdict.score for found in candidates for verdict in found.student_verdicts]
    longer = [len(pair.chosen.tokens) > len(pair.rejected.tokens) for pair in pairs]
    return {
        "problems": len(candidates),
        "pairs": len(pairs),
        "teacher_score": round(fmean(teacher), 4) if teacher else None,
        "student_score": round(fmean(student), 4) if student else None,
        "dropped": dict(Counter(dropped)),
        "chosen_tokens": round(fmean(len(pair.chosen.tokens) for pair in pairs), 2) if pairs else None,
        "rejected_tokens": round(fmean(len(pair.rejected.tokens) for pair in pairs), 2) if pairs else None,
        "chosen_longer_share": round(fmean(longer), 4) if longer else None,
    }


def _ratio(one: Completion, other: Completion) -> float:
    first, second = len(one.tokens), len(other.tokens)
    return max(first, second) / min(first, second)
