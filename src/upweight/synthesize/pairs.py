"""Distillation pairs: positives from a teacher, negatives from the student itself, kept only where clearly apart.

Of all combinations of a problem's completions that pass the rules, those closest in length are taken: a pair that is
right and long against wrong and short teaches length. Where one side is the longer one in most pairs nonetheless, the
set can be balanced (`balanced`). What is dropped is counted by the rule that dropped it.
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
        length_bias: the guard of the whole set, 0-1: the share of pairs whose positive is longer less the share of
            those whose negative is. Beyond it, pairs of the more frequent kind are dropped, the most unequal first.
            1 drops none; a bias above a half is said aloud either way.
    """

    margin: float = 0.5
    lowest_positive: float = 1.0
    pairs_per_problem: int = 1
    longest_ratio: float = 2.0
    truncated_negatives: bool = False
    thought: bool = True
    length_bias: float = 1.0

    def __post_init__(self) -> None:
        if self.margin <= 0 or self.pairs_per_problem < 1 or self.longest_ratio < 1 or not 0 <= self.length_bias <= 1:
            raise UserError(
                f"margin {self.margin}, {self.pairs_per_problem} pairs a problem, longest_ratio {self.longest_ratio}, "
                f"length_bias {self.length_bias}: expected a margin above 0, at least one pair, a ratio of at least 1, "
                "a bias in 0-1"
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


def length_bias(pairs: Sequence[Pair]) -> float:
    """The share of pairs whose positive is longer, less the share of those whose negative is; -1 to 1, 0 for none."""
    return fmean(_longer(pair) for pair in pairs) if pairs else 0.0


def balanced(pairs: Sequence[Pair], rules: PairRules) -> tuple[list[Pair], list[Pair]]:
    """The pairs kept, in their order, and those that the guard drops so that the bias stays within `length_bias`."""
    side = 1 if length_bias(pairs) > 0 else -1
    surplus = sorted(
        (index for index, pair in enumerate(pairs) if _longer(pair) == side),
        key=lambda index: -_ratio(pairs[index].chosen, pairs[index].rejected),
    )
    total, apart, dropped = len(pairs), abs(sum(map(_longer, pairs))), 0
    while apart - dropped > rules.length_bias * (total - dropped) + 1e-9:
        dropped += 1
    gone = set(surplus[:dropped])
    return (
        [pair for index, pair in enumerate(pairs) if index not in gone],
        [pair for index, pair in enumerate(pairs) if index in gone],
    )


def _longer(pair: Pair) -> int:
    """1 where the positive has more tokens, -1 where the negative has."""
    chosen, rejected = len(pair.chosen.tokens), len(pair.rejected.tokens)
    return (chosen > rejected) - (chosen < rejected)


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
        "length_bias": round(length_bias(pairs), 4),
    }


def _ratio(one: Completion, other: Completion) -> float:
    first, second = len(one.tokens), len(other.tokens)
    return max(first, second) / min(first, second)
