"""reconstruct: a chain of thought for every refined solution, checked, as conversations to imitate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Literal

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.work import Estimate, Summary, Work
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.expert import RuleBasedExpert
from upweight.synthesize.reconstruct import (
    Bounds,
    Prompts,
    Reconstructed,
    completion_examples,
    reconstruct,
    unrefined,
    unwritten,
)
from upweight.synthesize.roles import Checkpoint, Part, cast
from upweight.synthesize.structured import Asking, Cost
from upweight.synthesize.trail import Refined, Trail

EXAMPLES = 3


@dataclass(frozen=True)
class Config:
    """Attributes:
    summariser, completer: who writes the summaries and the chains; a Sampler, or a Checkpoint.
    asking: how they are asked; the seed is derived from the step's own.
    bounds: what a chain has to keep to.
    prompts: what they are asked with.
    source: what the conversations are counted by is "<source of the problem>-<this>".
    block: solutions worked off together, and lost at most in a kill.
    target: what is imitated: the refined solution behind a "written" chain, or, to compare with: the refined solution
        behind the "kept" thought of its draft, or the first "draft" as it was sampled. Nothing is written or checked
        for the latter two.
    """

    summariser: Part = RuleBasedExpert()  # noqa: RUF009 - frozen
    completer: Part = RuleBasedExpert()  # noqa: RUF009 - frozen
    asking: Asking = field(default_factory=Asking)
    bounds: Bounds = field(default_factory=Bounds)
    prompts: Prompts = field(default_factory=Prompts)
    source: str = "reconstructed"
    block: int = 256
    target: Literal["written", "kept", "draft"] = "written"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"block is {self.block}: at least one solution is worked off at a time")
        if self.target not in ("written", "kept", "draft"):
            raise UserError(f"target is {self.target!r}: expected 'written', 'kept' or 'draft'")


def run(config: Config, work: Work) -> Summary:
    """Write `conversations.jsonl`, `dropped.jsonl`, and `completer.jsonl`, which trains a writer of chains."""
    source = work.inputs["refined"]
    refined = read_jsonl(source / "refined.jsonl", Refined)
    if not refined:
        raise UserError(f"{source} holds no refined solution: see its dropped.jsonl for the reasons")
    match config.target:
        case "written":
            made = _written(config, work, refined)
        case "kept":
            made = [unwritten(one) for one in refined]
        case "draft":
            made = [unrefined(trail) for trail in read_jsonl(source / "trail.jsonl", Trail) if trail.candidates]
    right = [one for one in made if not one.fault]
    conversations = [one.conversation(f"{one.problem.source or 'problem'}-{config.source}") for one in right]
    write_jsonl(work.out / "conversations.jsonl", conversations)
    write_jsonl(work.out / "dropped.jsonl", [one for one in made if one.fault])
    examples = write_jsonl(work.out / "completer.jsonl", completion_examples(conversations))
    clear(work.out / "blocks")
    if not conversations:
        raise UserError(
            f"none of {len(made)} chains may be imitated ({dict(Counter(one.fault for one in made))}): "
            "give the part of the completer to a better model, or loosen the bounds"
        )
    return {
        "refined": len(made),
        "conversations": len(conversations),
        "dropped": dict(Counter(one.fault for one in made if one.fault)),
        "by_source": dict(Counter(talk.source for talk in conversations)),
        "authors": dict(Counter(one.author for one in right)),
        "chain_characters": round(fmean(len(one.chain) for one in right), 1),
        "completer_examples": examples,
        "cost": asdict(sum((one.cost for one in made), Cost())),
        "examples": [
            {
                "question": one.problem.messages[-1].content,
                "summary": one.summary,
                "chain": one.chain,
                "solution": one.solution,
            }
            for one in right[:EXAMPLES]
        ],
        "dropped_examples": [
            {"fault": one.fault, "detail": one.detail, "chain": one.chain[:400]} for one in made if one.fault
        ][:EXAMPLES],
    }


def _written(config: Config, work: Work, refined: Sequence[Refined]) -> list[Reconstructed]:
    """A chain for each solution, by the writers, checked."""
    summariser = cast(config.summariser, work.inputs, work.machine)
    completer = cast(config.completer, work.inputs, work.machine)
    asking = replace(config.asking, limits=replace(config.asking.limits, seed=seed_for(work.seed, "asking")))

    def work_off(block: Sequence[Refined]) -> Sequence[Reconstructed]:
        return reconstruct(block, summariser, completer, asking=asking, bounds=config.bounds, prompts=config.prompts)

    made: list[Reconstructed] = []
    for block in in_blocks(
        work.out / "blocks", refined, config.block, Reconstructed, work_off, work.monitor, "reconstruct"
    ):
        made += block
    return made


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Nothing but reading and writing where experts write; else a summary and a chain for each solution."""
    count = inputs["refined"].records.get("refined.jsonl", inputs["refined"].disk_bytes / 6000)
    parts = [part for part in (config.summariser, config.completer) if isinstance(part, Checkpoint)]
    each = count * config.asking.limits.max_new_tokens / 4
    sizes = [inputs[part.input].parameters for part in parts if part.input in inputs]
    return Estimate(
        tokens=each * len(sizes),
        flops=sum((2 * size * each for size in sizes), 0.0),
        sampled_flops=sum((2 * size * each for size in sizes), 0.0),
        memory_bytes=3e8 + sum(4 * size for size in sizes),
        disk_bytes=2000 * count,
        seconds=0.001 * count,
        records={"conversations.jsonl": count},
    )
