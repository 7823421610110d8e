"""The difficulty gate: only problems that the policy sometimes solves can teach it anything by reinforcement.

    keep problem i  iff  low < avg@count_i < high         strictly; 0.1, 0.9 and 16 in the report

A problem that is always or never solved gives every completion of its group the same reward, hence no advantage.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean, median

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler, Verifier
from upweight.core.records import Problem, Rollout


@dataclass(frozen=True)
class Gate:
    """Attributes:
    count: samples of each problem.
    low, high: the pass rate has to lie strictly between them.
    """

    count: int = 16
    low: float = 0.1
    high: float = 0.9

    def __post_init__(self) -> None:
        if self.count < 1 or not self.low < self.high:
            raise UserError(f"{self.count} samples in ({self.low}, {self.high}): expected at least one and low < high")

    def reason(self, rate: float) -> str | None:
        """Why a problem of this pass rate is dropped, None where it is kept."""
        if rate <= self.low:
            return "too hard"
        return "too easy" if rate >= self.high else None


@dataclass(frozen=True, slots=True)
class Measured:
    """How often the policy solves a problem. `dropped` is "too hard", "too easy" or None for a problem that is kept.

    Attributes:
        rate: the mean score of its samples.
        truncated_share: of its samples, cut off at the length limit; they count as their verifier scores them.
        right_tokens: the median length of the samples with a score above 1/2; None where there are none.
    """

    problem: Problem
    rate: float
    samples: int
    truncated_share: float
    dropped: str | None
    right_tokens: float | None = None


def measure(
    problems: Sequence[Problem], sampler: Sampler, verifier: Verifier, gate: Gate, limits: Limits
) -> list[Measured]:
    """Every problem, in order, with its rate and whether it passes the gate."""
    groups = sampler.sample([problem.messages for problem in problems], count=gate.count, limits=limits)
    return [
        measured(Rollout(problem, tuple(group), tuple(verifier.score(problem, group))), gate)
        for problem, group in zip(problems, groups, strict=True)
    ]


def measured(rollout: Rollout, gate: Gate) -> Measured:
    """What a judged group says of its problem."""
    group, verdicts = rollout.completions, rollout.verdicts
    # the sum before the one division: 16 verdicts of 0 and 1 give 0.1 and 0.9 exactly where they are meant
    rate = fsum(verdict.score for verdict in verdicts) / len(verdicts)
    cut = fmean(completion.truncated for completion in group)
    right = [len(one.tokens) for one, verdict in zip(group, verdicts, strict=True) if verdict.score > 0.5]
    usual = float(median(right)) if right else None
    return Measured(rollout.problem, rate, len(group), cut, gate.reason(rate), usual)


def histogram(found: Sequence[Measured], gate: Gate) -> Mapping[str, object]:
    """Counts for the report: kept, dropped by reason, and how many problems have each rate."""
    kept = [one for one in found if one.dropped is None]
    return {
        "problems": len(found),
        "kept": len(kept),
        "kept_share": round(len(kept) / len(found), 4) if found else None,
        "dropped": dict(Counter(one.dropped for one in found if one.dropped is not None)),
        "mean_rate": round(fmean(one.rate for one in found), 4) if found else None,
        "mean_rate_kept": round(fmean(one.rate for one in kept), 4) if kept else None,
        "truncated_share": round(fmean(one.truncated_share for one in found), 4) if found else None,
        "rates": dict(Counter(f"{rate:.4g}" for rate in sorted(one.rate for one in found))),
        "bounds": [gate.low, gate.high],
        "samples": gate.count,
    }
