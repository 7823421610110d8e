"""Solution refinement: drafts, a checklist made for the instruction, critique by several models, revision, again.

    instruction -> checklist            drafts (teachers, the current model)
    best draft  -> critiques -> revision -> critiques -> revision ... until the score stops rising, or a bound

Source: Nanbeige4-3B (arXiv 2512.06266), solution refinement. Every part is played by a Sampler. A criterion that can be
verified is verified (equivalence of answers, code run in the sandbox): a critic's opinion of it is kept, but the
verifier's word counts. Open in the report and chosen here: at most three rounds; a revision that does not raise the
score ends the loop and the better text is kept; a critic that praises everything ends it after the drafts.

All problems go through the loop together, so that each part is asked in large batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler, Verifier
from upweight.core.records import HIGHEST_SCORE, Completion, Problem
from upweight.synthesize.checklist import Judgement, checklist_text, parse_checklist, parse_judgement
from upweight.synthesize.prompts import fill, read_prompt, require
from upweight.synthesize.structured import Asking, Cost, Reply, ask, between
from upweight.synthesize.trail import Candidate, Criterion, CriterionScore, Critique, Refined, Stop, Trail, weighted
from upweight.verify.answers import visible_part


@dataclass(frozen=True)
class Prompts:
    """The texts that the parts are asked with; each has the places named in its default."""

    checklist: str = field(default_factory=partial(read_prompt, "checklist"))
    critique: str = field(default_factory=partial(read_prompt, "critique"))
    revision: str = field(default_factory=partial(read_prompt, "revision"))

    def __post_init__(self) -> None:
        require("checklist", self.checklist, "problem")
        require("critique", self.critique, "checklist", "answer")
        require("revision", self.revision, "answer", "critique")

    @classmethod
    def of(cls, folder: str | Path) -> "Prompts":
        """The prompts of a folder (checklist.md, critique.md, revision.md), each as shipped where it is not there."""
        return cls(*(read_prompt(name, folder) for name in ("checklist", "critique", "revision")))


@dataclass(frozen=True)
class Loop:
    """How long to go on, and how to ask.

    Attributes:
        drafts: from each drafter.
        draft_limits: how drafts are decoded.
        asking: how checklist writer, evaluators and reviser are asked.
        rounds: revisions at most.
        good_enough: a score, 0-9, from which nothing is revised.
        smallest_gain: a revision that raises the score by no more than this ends the loop.
        accepted_score: a solution below this is not passed on, 0-9.
    """

    drafts: int = 2
    draft_limits: Limits = Limits(max_new_tokens=256)  # noqa: RUF009 - frozen
    asking: Asking = Asking()  # noqa: RUF009 - frozen
    rounds: int = 3
    good_enough: float = 8.5
    smallest_gain: float = 0.0
    accepted_score: float = 7.0
    prompts: Prompts = field(default_factory=Prompts)

    def __post_init__(self) -> None:
        if self.drafts < 1 or self.rounds < 0:
            raise UserError(f"{self.drafts} drafts and {self.rounds} rounds: at least one draft, rounds from 0")


@dataclass(frozen=True)
class Cast:
    """Who plays which part.

    Attributes:
        drafters: write first candidates: teachers, the current model.
        checklist: writes the checklist.
        evaluators: score and criticise; several see more.
        reviser: rewrites.
    """

    drafters: Sequence[Sampler]
    checklist: Sampler
    evaluators: Sequence[Sampler]
    reviser: Sampler

    def __post_init__(self) -> None:
        if not self.drafters or not self.evaluators:
            raise UserError("refinement needs at least one drafter and one evaluator")


@dataclass
class _Run:
    """One problem on its way."""

    problem: Problem
    criteria: tuple[Criterion, ...] = ()
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int | None = None
    rounds: int = 0
    stopped: Stop | None = None
    failure: str = ""
    cost: Cost = field(default_factory=Cost)

    @property
    def question(self) -> str:
        return question_of(self.problem)

    def best(self) -> Candidate:
        assert self.chosen is not None
        return self.candidates[self.chosen]

    def fail(self, why: str) -> None:
        self.stopped, self.failure = "failed", why

    def trail(self) -> Trail:
        return Trail(
            self.problem,
            self.criteria,
            tuple(self.candidates),
            self.chosen,
            self.rounds,
            self.stopped or "rounds",
            self.failure,
            self.cost,
        )


def refine(problems: Sequence[Problem], cast: Cast, verifier: Verifier | None, loop: Loop) -> list[Trail]:
    """The trail of each problem, in order. Bounded: drafts, one checklist, and at most `loop.rounds` revisions.

    Raises NeverInForm where a model cannot play its part; a single unreadable answer only costs its problem.
    """
    runs = [_Run(problem) for problem in problems]
    _write_checklists(runs, cast, loop)
    _draft(_open(runs), cast, verifier, loop)
    for number in range(1, loop.rounds + 1):
        for run in _open(runs):
            if run.best().score >= loop.good_enough:
                run.stopped = "good enough"
        if not _open(runs):
            break
        _revise(_open(runs), number, cast, verifier, loop)
    for run in _open(runs):
        run.stopped = "good enough" if run.best().score >= loop.good_enough else "rounds"
    return [run.trail() for run in runs]


def accepted(trail: Trail, loop: Loop) -> Refined | str:
    """The refined solution of a trail, or the reason why it is not passed on."""
    best = trail.best
    if best is None:
        return f"failed: {trail.failure}"
    if best.verified is False:
        return "the solution is verified wrong"
    if best.score < loop.accepted_score:
        return f"the score stays below {loop.accepted_score:g}"
    thought = trail.draft.thought if trail.draft is not None else ""
    return Refined(trail.problem, best.text, best.score, best.verified, trail.rounds, best.author, thought)


def question_of(problem: Problem) -> str:
    """The conversation of a problem as one text; a single question stands as it is."""
    if len(problem.messages) == 1:
        return problem.messages[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in problem.messages)


def solution_of(text: str) -> str:
    """What a person reads of a completion: its text without the thought; nothing where the thought never ends."""
    return (visible_part(text) or "").strip()


def thought_of(text: str) -> str:
    """The thought of a completion, whose opening tag may stand in the prompt; nothing where there is none."""
    before, closed, after = text.rpartition("</think>")
    outside, opened, inside = (before if closed else after).partition("<think>")
    return (inside if opened else outside if closed else "").strip()


def _open(runs: Sequence[_Run]) -> list[_Run]:
    return [run for run in runs if run.stopped is None]


def _write_checklists(runs: Sequence[_Run], cast: Cast, loop: Loop) -> None:
    prompts = [fill(loop.prompts.checklist, problem=run.question) for run in runs]
    replies = ask(cast.checklist, prompts, [parse_checklist] * len(runs), loop.asking, part="checklist writer")
    for run, reply in zip(runs, replies, strict=True):
        run.cost += reply.cost
        if reply.value is None:
            run.fail(f"no checklist: {reply.why}")
        else:
            run.criteria = reply.value


def _draft(runs: Sequence[_Run], cast: Cast, verifier: Verifier | None, loop: Loop) -> None:
    written: list[tuple[_Run, Completion]] = []
    for drafter in cast.drafters:
        groups = drafter.sample([run.problem.messages for run in runs], count=loop.drafts, limits=loop.draft_limits)
        for run, group in zip(runs, groups, strict=True):
            written += [(run, completion) for completion in group]
            characters = sum(len(completion.text) for completion in group)
            tokens = sum(len(completion.tokens) for completion in group)
            run.cost += Cost(len(group), len(run.question), characters, tokens)
    texts = [(run, solution_of(completion.text), completion.policy) for run, completion in written]
    judged = _judge(texts, "draft", 0, cast, verifier, loop)
    for (run, completion), candidate in zip(written, judged, strict=True):
        run.candidates.append(replace(candidate, thought=thought_of(completion.text)))
    for run in runs:
        run.chosen = max(range(len(run.candidates)), key=lambda index: (run.candidates[index].score, -index))


def _revise(runs: Sequence[_Run], number: int, cast: Cast, verifier: Verifier | None, loop: Loop) -> None:
    prompts = [
        fill(
            loop.prompts.revision,
            problem=run.question,
            checklist=checklist_text(run.criteria),
            answer=run.best().text,
            critique=_critique_text(run.best()),
        )
        for run in runs
    ]
    replies = ask(cast.reviser, prompts, [between("solution")] * len(runs), loop.asking, part="reviser")
    revised = []
    for run, reply in zip(runs, replies, strict=True):
        run.cost += reply.cost
        run.rounds = number
        if reply.value is None:
            run.stopped = "no gain"
        else:
            revised.append((run, reply.value, reply.policy))
    for (run, _, _), candidate in zip(revised, _judge(revised, "revision", number, cast, verifier, loop), strict=True):
        gained = candidate.score - run.best().score
        run.candidates.append(candidate)
        if gained > 0:
            run.chosen = len(run.candidates) - 1
        if gained <= loop.smallest_gain:
            run.stopped = "no gain"


def _judge(
    written: Sequence[tuple[_Run, str, str]],
    origin: str,
    number: int,
    cast: Cast,
    verifier: Verifier | None,
    loop: Loop,
) -> list[Candidate]:
    """Each text with its verified and judged scores."""
    prompts = [
        fill(
            loop.prompts.critique,
            problem=run.question,
            checklist=checklist_text(run.criteria),
            answer=text,
        )
        for run, text, _ in written
    ]
    parsers = [partial(parse_judgement, criteria=run.criteria) for run, _, _ in written]
    columns = [ask(evaluator, prompts, parsers, loop.asking, part="evaluator") for evaluator in cast.evaluators]
    judged = []
    for index, (run, text, author) in enumerate(written):
        replies = [column[index] for column in columns]
        for reply in replies:
            run.cost += reply.cost
        scores = _scores(run, text, replies, verifier)
        critiques = tuple(Critique(reply.policy, reply.value.critique) for reply in replies if reply.value is not None)
        judged.append(
            Candidate(
                text,
                author,
                "draft" if origin == "draft" else "revision",
                number,
                scores,
                critiques,
                weighted(run.criteria, scores),
            )
        )
    return judged


def _scores(
    run: _Run, text: str, replies: Sequence[Reply[Judgement]], verifier: Verifier | None
) -> tuple[CriterionScore, ...]:
    verdict = None
    checkable = verifier is not None and (run.problem.answer is not None or run.problem.tests)
    if verifier is not None and checkable and any(criterion.check == "verify" for criterion in run.criteria):
        verdict = verifier.score(run.problem, [Completion((), (), text, "end", "candidate")])[0]
    scores = []
    for place, criterion in enumerate(run.criteria):
        judged = tuple(None if reply.value is None else reply.value.scores[place] for reply in replies)
        given = [score for score in judged if score is not None]
        if criterion.check == "verify" and verdict is not None:
            value = HIGHEST_SCORE * min(1.0, max(0.0, verdict.score))
            scores.append(CriterionScore(criterion.name, judged, verdict.score, verdict.reason, value))
        else:
            mean = sum(given) / len(given) if given else 0.0
            scores.append(CriterionScore(criterion.name, judged, None, "", mean))
    return tuple(scores)


def _critique_text(candidate: Candidate) -> str:
    """What the reviser is told: every critique, and what failed verification (never the reference answer)."""
    parts = [critique.text for critique in candidate.critiques if critique.text]
    parts += [
        f"Verified: {score.criterion} does not hold."
        for score in candidate.scores
        if score.verified is not None and score.verified < 1
    ]
    return "\n\n".join(parts) or "Nothing was said."
