"""gate: keep the problems that the checkpoint solves sometimes, by avg@count strictly inside (low, high).

An earlier gate's artifact as the input "measured" spares sampling what it has measured already: problems that the same
weights answered as often, decoded and judged alike. Other bounds, or more problems, then cost only what is new.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint, seed_for
from upweight.core.protocols import Limits, Sampler
from upweight.core.records import Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.model.precision import Precision
from upweight.rollout.local import planned_bytes
from upweight.store.artifact import MANIFEST, read_manifest, write_whole
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.difficulty import Gate, Measured, histogram, measure
from upweight.synthesize.portions import Portions, listed, read_portions
from upweight.synthesize.roles import Checkpoint, cast
from upweight.verify.reward import RewardConfig, open_verifier

EXAMPLES = 3
KEPT_SHARE = 0.6
"""Of the problems, for the plan: over three seeds of the quickstart 0.62 to 0.67."""
ORIGIN = "measured_by.json"


@dataclass(frozen=True)
class Config:
    """Attributes:
    problems: which problems of the input "problems" to measure; best those that no earlier step has trained on.
    reward: which verifier judges. Win rates average 1/2 in every group, so preference problems are gated by answers.
    gate: samples and bounds.
    limits: how to sample; the seed is derived from the step's own.
    enough: stop after the block in which so many are kept; 0 measures all.
    block: problems measured together, and lost at most in a kill.
    dtype: what the weights are held in: "bfloat16" is what GPUs are made for.
    """

    problems: Portions = field(default_factory=lambda: {"stem.jsonl": 0})
    reward: RewardConfig = field(default_factory=RewardConfig)
    gate: Gate = field(default_factory=Gate)
    limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=96))
    enough: int = 0
    block: int = 128
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.reward.relative:
            raise UserError(
                "the gate cannot use the preference reward: win rates within a group always average 1/2, so every "
                "problem would be kept. Gate these problems by their answers, RewardConfig(kind='answer')"
            )
        if self.block < 1:
            raise UserError(f"block is {self.block}: at least one problem is measured at a time")


def run(config: Config, work: Work) -> Summary:
    """Write `problems.jsonl` (kept), `dropped.jsonl` (with the reason) and `measured.jsonl` (all)."""
    problems = read_portions(work.inputs["problems"], config.problems)
    sampler = cast(Checkpoint("model", dtype=config.dtype), work.inputs, work.machine)
    origin = _origin(sampler, config, work)
    known = _known(work, origin, config.gate)
    limits = replace(config.limits, seed=seed_for(work.seed, "gate"))
    measured: list[Measured] = []
    with open_verifier(config.reward, work.inputs, work.machine) as verifier:

        def work_off(block: Sequence[Problem]) -> Sequence[Measured]:
            # a problem that was changed under its old id is another one
            same = {problem.id for problem in block if problem.id in known and known[problem.id].problem == problem}
            new = [problem for problem in block if problem.id not in same]
            found = known | {one.problem.id: one for one in measure(new, sampler, verifier, config.gate, limits)}
            return [found[problem.id] for problem in block]

        blocks = in_blocks(
            work.out / "blocks", problems, config.block, Measured, work_off, work.monitor, "measure difficulty"
        )
        for block in blocks:
            measured += block
            if config.enough and sum(one.dropped is None for one in measured) >= config.enough:
                break
    kept = [one.problem for one in measured if one.dropped is None]
    write_jsonl(work.out / "problems.jsonl", kept)
    write_jsonl(work.out / "dropped.jsonl", [one for one in measured if one.dropped is not None])
    write_jsonl(work.out / "measured.jsonl", measured)
    write_whole(work.out / ORIGIN, json.dumps({"fingerprint": origin}))
    clear(work.out / "blocks")
    return {
        **histogram(measured, config.gate),
        "not_measured": len(problems) - len(measured),
        "examples": {
            reason: [_example(one) for one in measured if (one.dropped or "kept") == reason][:EXAMPLES]
            for reason in ("kept", "too easy", "too hard")
        },
    }


def _origin(sampler: Sampler, config: Config, work: Work) -> str:
    """What a rate is a rate of: who answered, how often, how decoded and how judged, by whom. Seeds and bounds do not
    count."""
    policy = getattr(sampler, "policy", "")  # of a checkpoint, the fingerprint of its weights
    told: list[object] = [policy, config.gate.count, replace(config.limits, seed=0), config.reward]
    if "judge" in work.inputs:
        told.append(read_manifest(work.inputs["judge"] / MANIFEST)["identity"])
    return fingerprint(told)


def _known(work: Work, origin: str, gate: Gate) -> dict[str, Measured]:
    """What the input "measured" knows already, by this gate's bounds. Raises UserError where it measured otherwise."""
    if "measured" not in work.inputs:
        return {}
    earlier = work.inputs["measured"]
    stored = json.loads((earlier / ORIGIN).read_text())["fingerprint"] if (earlier / ORIGIN).exists() else None
    if stored != origin:
        raise UserError(
            f"{earlier} was measured with other weights, another number of samples, other limits, another reward or "
            'another judge than this gate asks for: leave the input "measured" out, or give one of the same checkpoint '
            "and settings"
        )
    found = read_jsonl(earlier / "measured.jsonl", Measured)
    return {one.problem.id: replace(one, dropped=gate.reason(one.rate)) for one in found}


def _example(one: Measured) -> dict[str, Any]:
    return {"question": one.problem.messages[-1].content, "answer": one.problem.answer, "rate": one.rate}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each sample reads the prompt's cache and writes about half of the tokens allowed; two operations a parameter.
    Of the problems some three in five are kept, and no more are measured than that takes."""
    model = inputs["model"]
    count = listed(config.problems, inputs["problems"].records if "problems" in inputs else {})
    if config.enough:
        count = min(count, config.enough / KEPT_SHARE)
    tokens = count * config.gate.count * config.limits.max_new_tokens / 2
    at_once = min(count, config.block) * config.gate.count
    return Estimate(
        tokens=tokens,
        flops=2.0 * model.parameters * tokens,
        sampled_flops=2.0 * model.parameters * tokens,
        memory_bytes=4 * model.parameters + planned_bytes(model.held_bytes, at_once, config.limits) + 5e8,
        disk_bytes=1500.0 * count,
        records={"problems.jsonl": KEPT_SHARE * count, "measured.jsonl": count},
        seconds=0.003 * count * config.gate.count if config.reward.kind == "code" else 0.0,
    )
