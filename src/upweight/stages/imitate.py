"""imitate: answers that a verifier finds right, as conversations to fine-tune on (rejection sampling).

The author is any model: a checkpoint of the run, an endpoint, a rule-based solver. Of each problem's samples the first
ones that are right and well formed are kept, the same text once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits
from upweight.core.records import Conversation, Message, Problem, Rollout
from upweight.core.work import Estimate, Summary, Work
from upweight.rollout.local import planned_bytes
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.checking import open_checks
from upweight.synthesize.portions import Portions, listed, read_portions
from upweight.synthesize.roles import Checkpoint, Part, cast
from upweight.verify.compose import FormatVerifier

EXAMPLES = 3


@dataclass(frozen=True)
class Config:
    """Attributes:
    problems: which problems of the input "problems" to answer.
    author: who answers them.
    samples: answers to each problem.
    kept: of a problem's right answers at most so many.
    limits: how to sample; the seed is derived from the step's own.
    thought: whether an answer has to open with one thought, closed (else it may hold none).
    block: problems worked off together, and lost at most in a kill.
    """

    problems: Portions = field(default_factory=lambda: {"stem.jsonl": 0})
    author: Part = Checkpoint("model")  # noqa: RUF009 - frozen
    samples: int = 1
    kept: int = 1
    limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=256))
    thought: bool = True
    block: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.samples or self.block < 1:
            raise UserError(
                f"{self.kept} of {self.samples} answers, blocks of {self.block}: expected 1 <= kept <= samples"
            )


def run(config: Config, work: Work) -> Summary:
    """Write `conversations.jsonl` and `dropped.jsonl`."""
    problems = read_portions(work.inputs["problems"], config.problems)
    author = cast(config.author, work.inputs, work.machine)
    limits = replace(config.limits, seed=seed_for(work.seed, "author"))
    rollouts: list[Rollout] = []
    with open_checks(problems, work.machine) as verifier:

        def work_off(block: Sequence[Problem]) -> Sequence[Rollout]:
            groups = author.sample([one.messages for one in block], count=config.samples, limits=limits)
            return [
                Rollout(one, tuple(group), tuple(verifier.score(one, group)))
                for one, group in zip(block, groups, strict=True)
            ]

        for made in in_blocks(work.out / "blocks", problems, config.block, Rollout, work_off, work.monitor, "imitate"):
            rollouts += made
    talks: list[Conversation] = []
    dropped: list[dict[str, str]] = []
    for rollout in rollouts:
        some = _right(rollout, config)
        talks += some
        if not some:
            reasons = Counter(verdict.reason.partition(":")[0] for verdict in rollout.verdicts)
            row = {
                "problem": rollout.problem.id,
                "source": rollout.problem.source,
                "reason": reasons.most_common(1)[0][0],
            }
            dropped.append(row)
    write_jsonl(work.out / "conversations.jsonl", talks)
    write_jsonl(work.out / "dropped.jsonl", dropped)
    clear(work.out / "blocks")
    if not talks:
        raise UserError(
            f"none of {len(rollouts)} problems has a right answer ({dict(Counter(row['reason'] for row in dropped))}): "
            "use a better author, more samples, or easier problems"
        )
    return {
        "problems": len(rollouts),
        "conversations": len(talks),
        "right_share": round(fmean(one.score >= 1 for rollout in rollouts for one in rollout.verdicts), 4),
        "dropped": dict(Counter(row["reason"] for row in dropped)),
        "by_source": dict(Counter(talk.source for talk in talks)),
        "examples": [[{turn.role: turn.content} for turn in talk.messages] for talk in talks[:EXAMPLES]],
    }


def _right(rollout: Rollout, config: Config) -> list[Conversation]:
    formed = FormatVerifier(thought=config.thought, answer=False).score(rollout.problem, rollout.completions)
    texts = [
        completion.text
        for completion, verdict, form in zip(rollout.completions, rollout.verdicts, formed, strict=True)
        if verdict.score >= 1 and form.score >= 1 and not completion.truncated
    ]
    return [
        Conversation((*rollout.problem.messages, Message("assistant", text)), rollout.problem.source or "imitated")
        for text in list(dict.fromkeys(texts))[: config.kept]
    ]


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each sample writes about half of the tokens allowed; two operations a parameter and token."""
    count = listed(config.problems, inputs["problems"].records if "problems" in inputs else {})
    author = inputs[config.author.input] if isinstance(config.author, Checkpoint) else Estimate()
    at_once = min(count, config.block) * config.samples
    tokens = count * config.samples * config.limits.max_new_tokens / 2
    return Estimate(
        tokens=tokens,
        flops=2 * author.parameters * tokens,
        memory_bytes=4 * author.parameters + planned_bytes(author.held_bytes, at_once, config.limits) + 5e8,
        disk_bytes=1000.0 * count,
        records={"conversations.jsonl": config.kept * count},
        seconds=0.01 * count,
    )
