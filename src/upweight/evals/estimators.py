"""What a benchmark reports: averaged sampling, never a single shot, with an interval clustered by problem.

With scores s_ij of sample j on problem i, n problems and k samples each:

    avg@k  = mean_i m_i,                     m_i = mean_j s_ij
    pass@k = mean_i [1 - C(N - c_i, k) / C(N, k)]   of N samples, c_i of them right (unbiased; Chen et al. 2021)
    maj@k  = mean_i [score of the answer given most often]

The samples of one problem are not independent, so problems are the units: SE = sd_i(m_i) / sqrt(n), sd with n - 1, and
the interval is the mean +- 1.96 SE (Miller 2024, "Adding error bars to evals"). Two checkpoints are compared on the
same problems, by the differences of their m_i, which takes the problems' own spread out. Sums are exact (math.fsum),
so the order of problems or samples changes nothing, not even the last bit.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import mpmath
from numpy.typing import NDArray

from upweight.core.errors import UserError

Scores = Sequence[Sequence[float | int]] | NDArray[Any]
"""problem x sample: nested sequences or a two-dimensional array of numbers or truth values."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and how sure it is.

    Attributes:
        mean: over problems.
        standard_error: of the mean, with problems as the units; infinite for a single problem.
        low, high: the 95% interval of the normal approximation; not clipped to the range of the scores.
        problems: how many problems.
        samples: how many samples of each.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    problems: int
    samples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval: for a difference, whether it is significant at 5%."""
        return self.low > 0 or self.high < 0


def avg_at_k(scores: Scores) -> Estimate:
    """The mean over problems of the mean over the k samples of each.

    Args:
        scores: problem x sample; every problem with the same number of samples.

    Raises UserError where there is no problem or sample, where numbers of samples differ, or a score is not finite.
    """
    rows = _checked(scores)
    samples = len(rows[0])
    return _estimate([math.fsum(row) / samples for row in rows], samples)


def pass_at_k(scores: Scores, k: int, *, passed: float = 1.0) -> Estimate:
    """The chance that at least one of k samples passes, unbiased from N >= k samples of each problem.

    Args:
        scores: problem x sample.
        k: samples that one attempt may draw, at most as many as there are.
        passed: the score from which a sample counts as right.
    """
    rows = _checked(scores)
    samples = len(rows[0])
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} cannot be told from {samples} samples a problem: draw at least {max(k, 1)}")
    chances = []
    for row in rows:
        wrong = sum(score < passed for score in row)
        chances.append(1.0 - math.comb(wrong, k) / math.comb(samples, k))
    return _estimate(chances, samples)


def maj_at_k(answers: Sequence[Sequence[str | None]], scores: Scores) -> Estimate:
    """The score of the answer that most of a problem's samples gave.

    Args:
        answers: problem x sample; equal strings are one answer, and None (no answer found) has no vote.
        scores: problem x sample, of the same shape.

    Answers that tie share the vote: their mean score counts, so the order of the samples decides nothing. A problem
    without a single answer scores 0.
    """
    rows = _checked(scores)
    if [len(row) for row in answers] != [len(row) for row in rows]:
        raise UserError("answers and scores differ in shape: give one answer (or None) for each score")
    return _estimate([_majority(given, row) for given, row in zip(answers, rows, strict=True)], len(rows[0]))


def paired_difference(first: Scores, second: Scores) -> Estimate:
    """How much better `second` is than `first` on the same problems in the same order: mean of the differences.

    The two may have different numbers of samples a problem. Raises UserError where the numbers of problems differ.
    """
    rows_first, rows_second = _checked(first), _checked(second)
    samples_first, samples_second = len(rows_first[0]), len(rows_second[0])
    if len(rows_first) != len(rows_second):
        raise UserError(
            f"{len(rows_first)} problems cannot be paired with {len(rows_second)}: "
            "both checkpoints have to answer the same ones"
        )
    differences = [
        math.fsum(after) / samples_second - math.fsum(before) / samples_first
        for before, after in zip(rows_first, rows_second, strict=True)
    ]
    return _estimate(differences, min(samples_first, samples_second))


@dataclass(frozen=True, slots=True)
class OverRuns:
    """A figure of independent runs, and how sure their mean is.

    Attributes:
        mean: over runs.
        low, high: the 95% interval by Student's t; infinite for a single run.
        runs: each run's figure.
    """

    mean: float
    low: float
    high: float
    runs: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def over_runs(values: Sequence[float]) -> OverRuns:
    """The mean of one figure over runs of different seeds, where the runs are the units: mean +- t SE.

    t is the 0.975 quantile of Student's distribution with n - 1 degrees of freedom, 4.30 for three runs: what two or
    three runs can show is little, and the interval says so. Raises UserError where there is no run.
    """
    count = len(values)
    if not count:
        raise UserError("there is no run to average over: give at least one")
    mean = math.fsum(values) / count
    if count == 1:
        return OverRuns(mean, -math.inf, math.inf, tuple(values))
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    reach = _student(count - 1) * error
    return OverRuns(mean, mean - reach, mean + reach, tuple(values))


def _student(freedom: int) -> float:
    """The two-sided quantile of Student's t: P(|T| > t) = I_{v / (v + t^2)}(v / 2, 1 / 2) = 1 - CONFIDENCE."""

    def excess(t: Any) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - (1 - CONFIDENCE)

    return float(mpmath.findroot(excess, (1.9, 13.0), solver="anderson"))


def _majority(given: Sequence[str | None], row: Sequence[float]) -> float:
    votes = Counter(answer for answer in given if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    counted = [score for answer, score in zip(given, row, strict=True) if answer in winners]
    return math.fsum(counted) / len(counted)  # winners have equally many votes, so this is the mean over winners


def _estimate(means: Sequence[float], samples: int) -> Estimate:
    count = len(means)
    mean = math.fsum(means) / count
    if count == 1:
        return Estimate(mean, math.inf, -math.inf, math.inf, 1, samples)
    variance = math.fsum((value - mean) ** 2 for value in means) / (count - 1)
    error = math.sqrt(variance / count)
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    return Estimate(mean, error, mean - reach, mean + reach, count, samples)


def _checked(scores: Scores) -> list[list[float]]:
    """The scores as lists of floats, all of one length."""
    rows = [[float(score) for score in row] for row in scores]
    if not rows:
        raise UserError("there is no problem to average over: give scores as problem x sample")
    if not rows[0]:
        raise UserError("problem 0 has no sample: draw at least one")
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise UserError(
                f"problem {index} has {len(row)} samples, problem 0 has {len(rows[0])}: "
                "avg@k needs the same k everywhere"
            )
        if not all(math.isfinite(score) for score in row):
            raise UserError(f"problem {index} has a score that is not finite: {row}")
    return rows
