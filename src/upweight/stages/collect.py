"""collect: problems of your own, from files, for every step that asks for problems.

A line of a file is a question with an answer or tests, see evals/problem_files.py. A share of them, chosen by the hash
of what is asked, is held back for evaluation and never handed to training.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.records import Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.evals.problem_files import kind_of, read_problems
from upweight.store.jsonl import write_jsonl

EXAMPLES = 3
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


@dataclass(frozen=True)
class Config:
    """Attributes:
    files: paths of JSONL files by name. Problems of "stem" become stem.jsonl and, held back, reserved_stem.jsonl.
    reserved_share: of each file that is held back for evaluation, 0-1. A problem stays on its side whatever else the
        file holds, and two problems that ask the same are on one side.
    """

    files: Mapping[str, str]
    reserved_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.reserved_share <= 1:
            raise UserError(f"reserved_share is {self.reserved_share}: expected a share, 0-1")
        odd = [name for name in self.files if not name or not set(name) <= NAME_CHARACTERS]
        if odd or not self.files:
            raise UserError(
                f"files are named {list(self.files)}: name at least one, in small letters, digits, underscore and minus"
            )


def run(config: Config, work: Work) -> Summary:
    """Write <name>.jsonl and reserved_<name>.jsonl for each file.

    Raises UserError where a line is no problem, and where one side of a split came out empty.
    """
    summary: dict[str, object] = {}
    for name, given in config.files.items():
        path = Path(given)
        problems = read_problems(path)
        kind = kind_of(problems, path)
        held = [problem for problem in problems if _reserved(problem, config.reserved_share)]
        kept = [problem for problem in problems if not _reserved(problem, config.reserved_share)]
        if not kept or (config.reserved_share and not held):
            raise UserError(
                f"{path} holds {len(problems)} problems: {len(held)} were held back for evaluation at a share of "
                f"{config.reserved_share} and {len(kept)} left for training. Add problems, or change reserved_share"
            )
        write_jsonl(work.out / f"{name}.jsonl", kept)
        write_jsonl(work.out / f"reserved_{name}.jsonl", held)
        summary[name] = {
            "kind": kind,
            "training": len(kept),
            "reserved": len(held),
            "fingerprint": fingerprint([problem.id for problem in problems]),
            "examples": [f"{one.messages[-1].content} -> {one.answer or one.tests[0]}" for one in kept[:EXAMPLES]],
        }
    return summary


def _reserved(problem: Problem, share: float) -> bool:
    asked = " ".join(" ".join(message.content.split()) for message in problem.messages)
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:8], "big") < share * 2**64


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """As large as the files that are there."""
    size = sum(path.stat().st_size for path in map(Path, config.files.values()) if path.exists())
    return Estimate(disk_bytes=size, seconds=size / 5e7, memory_bytes=2e8 + 3 * size)
