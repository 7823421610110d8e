"""exemplify: training examples for a chain-completion model, from traces that are right already.

`reconstruct` asks a model for the chain of thought that leads to a solution. Who has none strong enough trains one:

    right traces -> exemplify -> sft -> reconstruct.Config(completer=Checkpoint("completer"), prompts=SHORT)

A trace goes in only if its thought is closed, agrees with the solution and keeps to the bounds of `reconstruct`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from upweight.core.errors import UserError
from upweight.core.records import Conversation, Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.prompts import read_prompt
from upweight.synthesize.reconstruct import Bounds, Prompts, completion_examples, fault_of
from upweight.synthesize.refine import solution_of
from upweight.synthesize.talks import Source, conversations
from upweight.synthesize.trail import Refined
from upweight.verify.answers import extract

EXAMPLES = 3

SHORT = Prompts(chain=read_prompt("chain_short"))
"""What a small model that was trained here is asked with: problem and solution, without instructions or outline."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    data: traces: conversations whose last turn holds a thought and a solution.
    prompts: what the model will be asked with in `reconstruct`; give both steps the same.
    bounds: what a thought has to keep to.
    """

    data: tuple[Source, ...]
    prompts: Prompts = SHORT
    bounds: Bounds = field(default_factory=Bounds)


def run(config: Config, work: Work) -> Summary:
    """Write `conversations.jsonl`, for `sft`, and say what was left out."""
    right: list[Conversation] = []
    dropped: Counter[str] = Counter()
    for source in config.data:
        for talk in conversations(source, work.inputs):
            fault = _fault(talk, config)
            if fault:
                dropped[fault] += 1
            else:
                right.append(talk)
    examples = list(completion_examples(right, prompt=config.prompts.chain))
    write_jsonl(work.out / "conversations.jsonl", examples)
    if not examples:
        raise UserError(f"no trace can teach to write a chain ({dict(dropped)}): give conversations with thoughts")
    return {
        "traces": len(right) + dropped.total(),
        "examples": len(examples),
        "dropped": dict(dropped),
        "shown": [{turn.role: turn.content for turn in talk.messages} for talk in examples[:EXAMPLES]],
    }


def _fault(talk: Conversation, config: Config) -> str:
    """Why a trace may not be learned from; "" where it may."""
    answer = talk.messages[-1].content
    before, closed, _ = answer.rpartition("</think>")
    if talk.messages[-1].role != "assistant" or not closed:
        return "no closed thought"
    solution = solution_of(answer)
    if not solution:
        return "no solution"
    problem = Problem("", talk.messages[:-1], answer=extract(solution))
    chain = before.partition("<think>")[2].strip()
    return fault_of(chain, Refined(problem, solution, 0.0, None, 0, ""), config.bounds, config.prompts)[0]


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Reading and writing."""
    size = sum((given.disk_bytes for given in inputs.values()), 0.0)
    return Estimate(disk_bytes=size, memory_bytes=3e8 + 2 * size, seconds=size / 5e6)
