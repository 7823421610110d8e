"""refine: drafts by the current model, a checklist for each instruction, critique and revision until it is good.

The audit trail of every problem is kept (`trail.jsonl`), with what it cost. What goes on is `refined.jsonl`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.records import HIGHEST_SCORE, Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.checking import open_checks
from upweight.synthesize.expert import RuleBasedExpert
from upweight.synthesize.portions import Portions, listed, read_portions
from upweight.synthesize.refine import Cast, Loop, accepted, refine
from upweight.synthesize.roles import Checkpoint, Part, cast
from upweight.synthesize.structured import Cost
from upweight.synthesize.trail import Refined, Trail

EXAMPLES = 3
FEW_TEXTS, PRAISES_ALL = 8, 0.95
"""From so many texts on, an evaluator that gives full marks to this share of them is named."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    problems: which problems of the input "problems" to work on.
    drafters: who writes drafts; Checkpoint names an input of the step.
    checklist, evaluators, reviser: who plays these parts; a Sampler, or a Checkpoint.
    loop: rounds, stop rule, prompts and how to ask; seeds are derived from the step's own.
    block: problems worked off together, and lost at most in a kill.
    """

    problems: Portions = field(default_factory=lambda: {"stem.jsonl": 0})
    drafters: tuple[Part, ...] = (Checkpoint("model"),)
    checklist: Part = RuleBasedExpert()  # noqa: RUF009 - frozen
    evaluators: tuple[Part, ...] = (RuleBasedExpert(),)
    reviser: Part = RuleBasedExpert()  # noqa: RUF009 - frozen
    loop: Loop = field(default_factory=Loop)
    block: int = 256

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"block is {self.block}: at least one problem is worked off at a time")


def run(config: Config, work: Work) -> Summary:
    """Write `trail.jsonl`, `refined.jsonl` and `dropped.jsonl`."""
    problems = read_portions(work.inputs["problems"], config.problems)
    parts = Cast(
        drafters=[cast(part, work.inputs, work.machine) for part in config.drafters],
        checklist=cast(config.checklist, work.inputs, work.machine),
        evaluators=[cast(part, work.inputs, work.machine) for part in config.evaluators],
        reviser=cast(config.reviser, work.inputs, work.machine),
    )
    loop = _seeded(config.loop, work.seed)
    trails: list[Trail] = []
    with open_checks(problems, work.machine) as verifier:

        def work_off(block: Sequence[Problem]) -> Sequence[Trail]:
            return refine(block, parts, verifier, loop)

        for block in in_blocks(work.out / "blocks", problems, config.block, Trail, work_off, work.monitor, "refine"):
            trails += block
    results = [accepted(trail, loop) for trail in trails]
    refined = [result for result in results if isinstance(result, Refined)]
    dropped = [
        {"problem": trail.problem.id, "source": trail.problem.source, "reason": result}
        for trail, result in zip(trails, results, strict=True)
        if isinstance(result, str)
    ]
    write_jsonl(work.out / "trail.jsonl", trails)
    write_jsonl(work.out / "refined.jsonl", refined)
    write_jsonl(work.out / "dropped.jsonl", dropped)
    clear(work.out / "blocks")
    told = summary(trails, refined, [row["reason"] for row in dropped])
    _say_who_praises(told, work)
    return told


def _seeded(loop: Loop, seed: int) -> Loop:
    drafts = replace(loop.draft_limits, seed=seed_for(seed, "drafts"))
    asking = replace(loop.asking, limits=replace(loop.asking.limits, seed=seed_for(seed, "asking")))
    return replace(loop, draft_limits=drafts, asking=asking)


def summary(trails: Sequence[Trail], refined: Sequence[Refined], dropped: Sequence[str]) -> Summary:
    """Drafts right before, solutions right after, why the loop stopped, what critics are worth, and what it cost."""
    drafts = [one for trail in trails for one in trail.candidates if one.origin == "draft"]
    checked = [one.verified for one in drafts if one.verified is not None]
    best = [trail.best.verified for trail in trails if trail.best is not None and trail.best.verified is not None]
    return {
        "problems": len(trails),
        "refined": len(refined),
        "dropped": dict(Counter(dropped)),
        "drafts_right_share": round(fmean(checked), 4) if checked else None,
        "solutions_right_share": round(fmean(best), 4) if best else None,
        "revised": sum(trail.rounds > 0 for trail in trails),
        "rounds": dict(sorted(Counter(str(trail.rounds) for trail in trails).items())),
        "stopped": dict(Counter(trail.stopped for trail in trails)),
        "evaluators_agree_with_verifier": _agreement(trails),
        "evaluators_strictness": strictness(trails),
        "authors": dict(Counter(one.author for one in refined)),
        "evaluators": sorted({c.evaluator for trail in trails for one in trail.candidates for c in one.critiques}),
        "cost": asdict(sum((trail.cost for trail in trails), Cost())),
        "examples": [_example(trail) for trail in trails if trail.rounds][:EXAMPLES],
    }


def _agreement(trails: Sequence[Trail]) -> dict[str, float]:
    """By evaluator: how often its score lies on the side of the middle that the verifier is on."""
    agreed: dict[str, list[bool]] = {}
    for trail in trails:
        for candidate in trail.candidates:
            for score in candidate.scores:
                if score.verified is None or len(score.judged) != len(candidate.critiques):
                    continue
                for critique, judged in zip(candidate.critiques, score.judged, strict=True):
                    if judged is not None:
                        side = (judged > HIGHEST_SCORE / 2) == (score.verified > 0.5)
                        agreed.setdefault(critique.evaluator, []).append(side)
    return {name: round(fmean(sides), 4) for name, sides in sorted(agreed.items())}


def strictness(trails: Sequence[Trail]) -> dict[str, dict[str, float | int]]:
    """By evaluator: texts it judged, its mean score, and the share of texts to which it gave full marks throughout.

    One that gives full marks to everything tells nothing apart: refinement ends after the drafts.
    """
    given: dict[str, list[list[int]]] = {}
    for candidate in (one for trail in trails for one in trail.candidates):
        columns = list(zip(*(score.judged for score in candidate.scores), strict=True))
        readable = [column for column in columns if None not in column]
        for critique, column in zip(candidate.critiques, readable, strict=True):
            given.setdefault(critique.evaluator, []).append([score for score in column if score is not None])
    return {
        name: {
            "texts": len(texts),
            "mean_score": round(fmean(score for scores in texts for score in scores), 2),
            "full_marks_share": round(fmean(min(scores) == HIGHEST_SCORE for scores in texts), 4),
        }
        for name, texts in sorted(given.items())
    }


def _say_who_praises(told: Summary, work: Work) -> None:
    """An evaluator that agrees with everything is no evaluator: the person who waits is told."""
    for name, figures in told["evaluators_strictness"].items():
        if figures["texts"] >= FEW_TEXTS and figures["full_marks_share"] >= PRAISES_ALL:
            work.monitor.say(
                f"the evaluator {name} gives full marks to {figures['full_marks_share']:.0%} of {figures['texts']} "
                "texts: it tells nothing apart, and what it cannot fault is not revised. Use a stricter one, or "
                "several, or criteria that can be verified"
            )


def _example(trail: Trail) -> dict[str, Any]:
    return {
        "question": trail.problem.messages[-1].content,
        "checklist": [f"{one.name} ({one.weight:g}, {one.check}): {one.requirement}" for one in trail.criteria],
        "candidates": [
            {
                "origin": f"{one.origin} {one.round}" if one.round else one.origin,
                "author": one.author,
                "score": round(one.score, 2),
                "verified": one.verified,
                "text": one.text,
                "critiques": [critique.text for critique in one.critiques],
            }
            for one in trail.candidates
        ],
        "stopped": trail.stopped,
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Drafts by the checkpoints; the other parts only where checkpoints play them, each about one answer a round."""
    count = listed(config.problems, inputs["problems"].records if "problems" in inputs else {})
    drafted = count * config.loop.drafts * config.loop.draft_limits.max_new_tokens / 2
    asked = count * (1 + config.loop.rounds) * config.loop.asking.limits.max_new_tokens / 4
    flops, tokens, memory = 0.0, 0.0, 5e8
    for parts, each in (
        (config.drafters, drafted),
        ((config.checklist, *config.evaluators, config.reviser), asked),
    ):
        for part in parts:
            if isinstance(part, Checkpoint) and part.input in inputs:
                flops += 2 * inputs[part.input].parameters * each
                memory += 4 * inputs[part.input].parameters
                tokens += each
    return Estimate(
        tokens=tokens,
        flops=flops,
        sampled_flops=flops,
        memory_bytes=memory,
        disk_bytes=6000.0 * count,
        seconds=0.002 * count,
        records={"trail.jsonl": count, "refined.jsonl": count},
    )
