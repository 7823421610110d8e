"""The audit trail of refinement: everything that was proposed, judged, said and rewritten on the way to a solution."""

from dataclasses import dataclass
from typing import Literal

from upweight.core.records import HIGHEST_SCORE, Problem
from upweight.synthesize.structured import Cost

Aspect = Literal["correctness", "completeness", "consistency", "executability", "safety"]
Check = Literal["verify", "judge"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a checklist.

    Attributes:
        name: unique within the checklist.
        aspect: what kind of merit it is.
        requirement: what has to hold.
        weight: how much it counts, above 0.
        check: "verify" is decided by a Verifier, "judge" by the evaluators.
    """

    name: str
    aspect: Aspect
    requirement: str
    weight: float
    check: Check


@dataclass(frozen=True, slots=True)
class CriterionScore:
    """How one candidate does on one criterion.

    Attributes:
        judged: 0-9 by each evaluator, None for one that could not be read.
        verified: the verifier's score, None where the criterion is not verified.
        reason: the verifier's reason.
        value: 0-9, what counts: the verifier's word where it has one, otherwise the mean of the evaluators.
    """

    criterion: str
    judged: tuple[int | None, ...]
    verified: float | None
    reason: str
    value: float


@dataclass(frozen=True, slots=True)
class Critique:
    """What one evaluator had to say."""

    evaluator: str
    text: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft or a revision and how it was judged.

    Attributes:
        score: the weighted mean of the criteria, 0-9.
        thought: of a draft, the thought before its text, as it was sampled.
    """

    text: str
    author: str
    origin: Literal["draft", "revision"]
    round: int
    scores: tuple[CriterionScore, ...]
    critiques: tuple[Critique, ...]
    score: float
    thought: str = ""

    @property
    def verified(self) -> bool | None:
        """Whether every verified criterion holds in full; None where none was verified."""
        checked = [score.verified for score in self.scores if score.verified is not None]
        return all(score >= 1 for score in checked) if checked else None


Stop = Literal["good enough", "no gain", "rounds", "failed"]


@dataclass(frozen=True, slots=True)
class Trail:
    """One problem's way through refinement.

    Attributes:
        candidates: drafts first, then revisions, in the order in which they were made.
        chosen: the index of the best candidate, None where the problem was given up.
        stopped: "good enough", "no gain" (a revision did not raise the score), "rounds" (the bound was reached) or
            "failed" (see `failure`).
    """

    problem: Problem
    criteria: tuple[Criterion, ...]
    candidates: tuple[Candidate, ...]
    chosen: int | None
    rounds: int
    stopped: Stop
    failure: str
    cost: Cost

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate."""
        return None if self.chosen is None else self.candidates[self.chosen]

    @property
    def draft(self) -> Candidate | None:
        """The best draft, from which every revision descends; the first of those that score alike."""
        drafts = [candidate for candidate in self.candidates if candidate.origin == "draft"]
        return max(drafts, key=lambda candidate: candidate.score, default=None)


@dataclass(frozen=True, slots=True)
class Refined:
    """A problem with its refined solution, as it goes on to chain reconstruction.

    Attributes:
        solution: the text that a person would read, without a thought.
        score: of the solution, 0-9.
        verified: whether its verified criteria hold; None where nothing could be verified.
        rounds: revisions it took.
        author: who wrote it.
        thought: of the draft that it descends from.
    """

    problem: Problem
    solution: str
    score: float
    verified: bool | None
    rounds: int
    author: str
    thought: str = ""


def weighted(criteria: tuple[Criterion, ...], scores: tuple[CriterionScore, ...]) -> float:
    """The mean of the scores, 0-9, by the weights of their criteria."""
    total = sum(criterion.weight for criterion in criteria)
    mean = sum(c.weight * s.value for c, s in zip(criteria, scores, strict=True)) / total
    return min(float(HIGHEST_SCORE), mean)
