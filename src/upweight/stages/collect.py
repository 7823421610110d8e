"""collect: problems of your own or of reasoning-gym, and pairs of your own, for every step that asks for them.

A line of a problem file is a question with an answer or tests, see evals/problem_files.py. A share of them, chosen by
the hash of what is asked, is held back for evaluation and never handed to training. A line of a pair file is a prompt
with a chosen and a rejected response, see synthesize/pair_files.py: what `distill`, `teach` and `reward` read.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.files import OUTSIDE
from upweight.core.identity import fingerprint
from upweight.core.records import Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.evals.problem_files import kind_of, read_problems
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.pair_files import read_pairs
from upweight.verify.gym import Drawn, Gym, draw

EXAMPLES = 3
DRAWN_AT_ONCE = 64
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


@dataclass(frozen=True)
class Config:
    """Attributes:
    files: where problems come from, by name: the path of a JSONL file, or families of reasoning-gym
        (verify.gym.Gym). Problems of "stem" become stem.jsonl and, held back, reserved_stem.jsonl.
    reserved_share: of each file that is held back for evaluation, 0-1. A problem stays on its side whatever else the
        file holds, and two problems that ask the same are on one side.
    pairs: path of a JSONL file of preference pairs, which becomes pairs.jsonl; "" where there is none.
    """

    files: Mapping[str, str | Gym] = field(default_factory=dict, metadata=OUTSIDE)
    reserved_share: float = 0.1
    pairs: str = field(default="", metadata=OUTSIDE)

    def __post_init__(self) -> None:
        if not 0 <= self.reserved_share <= 1:
            raise UserError(f"reserved_share is {self.reserved_share}: expected a share, 0-1")
        odd = [name for name in self.files if not name or not set(name) <= NAME_CHARACTERS]
        if odd or not (self.files or self.pairs):
            raise UserError(
                f"files are named {list(self.files)}: name at least one, in small letters, digits, underscore and "
                "minus, or give a file of pairs"
            )


def run(config: Config, work: Work) -> Summary:
    """Write <name>.jsonl and reserved_<name>.jsonl for each file, and pairs.jsonl.

    Raises UserError where a line is no problem or no pair, and where one side of a split came out empty.
    """
    summary: dict[str, object] = {}
    for name, given in config.files.items():
        if isinstance(given, Gym):
            where = f"reasoning-gym's {name!r}"
            problems, notes = _drawn(name, given, work)
        else:
            where, notes = given, {}
            problems = read_problems(Path(given))
        kind = kind_of(problems, Path(where))
        held = [problem for problem in problems if _reserved(problem, config.reserved_share)]
        kept = [problem for problem in problems if not _reserved(problem, config.reserved_share)]
        if (config.reserved_share < 1 and not kept) or (config.reserved_share and not held):
            raise UserError(
                f"{where} holds {len(problems)} problems: {len(held)} were held back for evaluation at a share of "
                f"{config.reserved_share} and {len(kept)} left for training. Add problems, or change reserved_share"
            )
        write_jsonl(work.out / f"{name}.jsonl", kept)
        write_jsonl(work.out / f"reserved_{name}.jsonl", held)
        summary[name] = {
            "kind": kind,
            "training": len(kept),
            "reserved": len(held),
            "fingerprint": fingerprint([problem.id for problem in problems]),
            **notes,
            "examples": [
                f"{one.messages[-1].content} -> {one.answer or next(iter(one.tests), None)}"
                for one in (kept or held)[:EXAMPLES]
            ],
        }
    if config.pairs:
        pairs = write_jsonl(work.out / "pairs.jsonl", read_pairs(Path(config.pairs)))
        summary["pairs"] = pairs
    return summary


def _drawn(name: str, source: Gym, work: Work) -> tuple[list[Problem], dict[str, object]]:
    """The sound and different problems of reasoning-gym, and how many of which family were kept and dropped.

    The families take turns, so that every portion of the file (`Take`, the first `count` of an evaluation) holds all.
    """
    places = [(family, index) for index in range(source.count) for family in source.families]
    folder = work.out / "blocks" / name

    def work_off(block: Sequence[tuple[str, int]]) -> Sequence[Drawn]:
        return [draw(source, *place, unsafe=work.machine.unsafe_execution) for place in block]

    found: dict[str, Problem] = {}
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for block in in_blocks(folder, places, DRAWN_AT_ONCE, Drawn, work_off, work.monitor, f"draw {name}"):
        for one in block:
            if one.problem is None or one.problem.id in found:
                dropped[f"{one.family}: {one.flaw or 'repeated'}"] += 1
            else:
                found[one.problem.id] = one.problem
                kept[one.family] += 1
    clear(folder)
    unfit = [family for family in source.families if not kept[family]]
    if unfit:
        raise UserError(
            f"no problem of reasoning-gym's {', '.join(unfit)} is sound: {dict(dropped)}. Leave these families out, "
            "or give them other settings"
        )
    return list(found.values()), {"families": dict(kept), "dropped": dict(dropped)}


def _reserved(problem: Problem, share: float) -> bool:
    asked = " ".join(" ".join(message.content.split()) for message in problem.messages)
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:8], "big") < share * 2**64


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """As large as the files that are there; a problem of reasoning-gym takes about 10 ms to make and try."""
    files = [Path(given) for given in (*config.files.values(), config.pairs) if isinstance(given, str) and given]
    made = {name: len(given.families) * given.count for name, given in config.files.items() if isinstance(given, Gym)}
    drawn = sum(made.values())
    shares = {"": 1 - config.reserved_share, "reserved_": config.reserved_share}
    records = {f"{side}{name}.jsonl": share * count for name, count in made.items() for side, share in shares.items()}
    size = sum(path.stat().st_size for path in files if path.exists()) + 2000 * drawn
    return Estimate(disk_bytes=size, seconds=size / 5e7 + 0.01 * drawn, memory_bytes=2e8 + 3 * size, records=records)
