"""The stage `reinforce` in several processes: run by test_01_reinforce in a process of its own.

reinforce_worker.py FOLDER
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.fsdp  # here, so that no child has to
from forked import together

from upweight.core.protocols import Limits, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.core.work import Machine, Silent, Work
from upweight.model import weights
from upweight.model.transformer import ModelConfig, make_model
from upweight.stages import reinforce
from upweight.store.jsonl import write_jsonl
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import OptimizerConfig
from upweight.verify.reward import RewardConfig

LAYOUTS: Mapping[str, tuple[int, Machine]] = {
    "one": (1, Machine()),
    "two": (2, Machine()),
    "fsdp": (2, Machine(sharding="fsdp")),
    "context": (4, Machine(context=2)),
}


@dataclass(frozen=True)
class Even(Verifier):
    """The share of even tokens."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(sum(token % 2 == 0 for token in one.tokens) / len(one.tokens), "") for one in group]


CONFIG = reinforce.Config(
    reward=RewardConfig(custom=Even()),
    steps=3,
    problems_a_step=5,  # no multiple of two
    group=4,
    limits=Limits(max_new_tokens=10, stop=("a",)),
    learning_rate=0.01,
    warmup_steps=0,
    interpolation=0.5,
    optimizer=OptimizerConfig(kind="adamw", epsilon=1e-3),
    batch_tokens=96,
    keep_rollouts_every=1,
)


def prepare(folder: Path) -> None:
    """A model and its problems."""
    tokenizer = Tokenizer.train(["what is 12 + 30? it is 42. sure, high medium\n"] * 20, 290).with_template(CHATML)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=2, ffn=24)
    weights.save(make_model(shape, 0), folder / "base" / "model")
    tokenizer.save(folder / "base" / "model")
    (folder / "problems").mkdir()
    problems = [Problem(str(n), (Message("user", f"what is {n} + {n}?"),), str(2 * n), (), "made") for n in range(7)]
    write_jsonl(folder / "problems" / "problems.jsonl", problems)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports for two seconds: once will do
    prepare(folder)
    inputs = {"model": folder / "base", "problems": folder / "problems"}
    for name, (size, machine) in LAYOUTS.items():

        def work(rank: int, name: str = name, machine: Machine = machine) -> None:
            out = folder / (name if rank == 0 else f"{name}{rank}")
            out.mkdir()
            watcher = Silent()
            summary = reinforce.run(CONFIG, Work(out, inputs, machine, watcher, 1))
            (out / "told.json").write_text(json.dumps({"summary": summary, "rows": watcher.rows}))

        if not together(size, machine, work):
            raise SystemExit(f"a process of {name} was killed")


if __name__ == "__main__":
    main()
