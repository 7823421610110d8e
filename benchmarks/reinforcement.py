"""Contests of sampling, verifying and reinforcement, into the table of docs/benchmarks.md.

    python -m benchmarks.reinforcement decode grpo            # prints the rows
    python -m benchmarks.reinforcement sandbox --write        # and puts them into the table
    python -m benchmarks.reinforcement decode-135m --model DIR

`answers` has no peer: its rate is printed.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import ours, sampling, verifying
from benchmarks.contest import Contender, contest, ratio
from benchmarks.sampling import GROUP, GROUPS, LONGEST, NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from benchmarks.table import Row, machine, put
from benchmarks.work import SHAPES, Work


class Contest(NamedTuple):
    """The work in words, what is counted, and who takes part; without a shape the model is given by its directory."""

    work: str
    unit: str
    contenders: Mapping[str, Contender]
    shape: str = "5.5M"


CONTESTS: Mapping[str, Contest] = {
    "decode": Contest(
        f"decoding 5.5M, {PROMPTS} prompts of {PROMPT_TOKENS}, {NEW_TOKENS} new tokens",
        "tokens",
        {
            "upweight": sampling.decode,
            "HF generate, dynamic cache": sampling.hf_dynamic,
            "HF generate, static cache": sampling.hf_static,
        },
    ),
    "decode-uneven": Contest(
        f"decoding 5.5M, {2 * PROMPTS} prompts of {PROMPT_TOKENS}, 1 to {LONGEST} new tokens, 32 on average",
        "tokens",
        {"upweight": sampling.decode_uneven, "HF generate, dynamic cache": sampling.hf_uneven},
    ),
    "decode-135m": Contest(
        f"decoding SmolLM2-135M, a group of 16, {NEW_TOKENS} new tokens",
        "tokens",
        {"upweight": sampling.decode_group, "HF generate, dynamic cache": sampling.hf_group},
        "",
    ),
    "grpo": Contest(
        f"GRPO step 5.5M, {GROUPS} x {GROUP} completions of {NEW_TOKENS}",
        "completions",
        {"upweight": sampling.grpo, "TRL GRPOTrainer": sampling.trl_grpo},
    ),
    "sandbox": Contest(
        "a program that prints a sum",
        "programs",
        {"upweight": verifying.sandbox, "fresh bare interpreter, no isolation": verifying.fresh_interpreter},
    ),
    "answers": Contest("plain numbers compared", "answers", {"upweight": verifying.answers}),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reinforcement", description=__doc__)
    parser.add_argument("contests", nargs="+", choices=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="calls, updates or batches of programs of one turn")
    parser.add_argument("--warmup", type=int, default=1, help="of these before the first turn")
    parser.add_argument("--model", default="", help="directory of SmolLM2-135M in Hugging Face format")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    chosen = parser.parse_args()
    for name in chosen.contests:
        rows = _rows(name, chosen)
        for row in rows:
            print(row.line())
        if chosen.write:
            put(rows, Path(__file__).parents[1] / "docs" / "benchmarks.md")


def _rows(name: str, chosen: argparse.Namespace) -> list[Row]:
    said = CONTESTS[name]
    if not said.shape and not chosen.model:
        sys.exit(f"{name} needs --model DIR, a directory of SmolLM2-135M in Hugging Face format")
    work = Work(said.work, SHAPES[said.shape]) if said.shape else Work(said.work, model=chosen.model)
    turns = contest(said.contenders, work, rounds=chosen.rounds, steps=chosen.steps, warmup=chosen.warmup)
    speeds = {peer: [turn.speed for turn in taken] for peer, taken in turns.items()}
    middle = {peer: statistics.median(some) for peer, some in speeds.items()}
    mine = speeds.pop("upweight")
    print(f"{said.work}: upweight {middle['upweight']:,.1f} {said.unit} a CPU-second", file=sys.stderr)
    command = f"python -m benchmarks.reinforcement {name} --rounds {chosen.rounds} --steps {chosen.steps}"
    return [
        Row(
            work=said.work,
            peer=peer,
            figures=f"{middle['upweight']:,.1f} against {middle[peer]:,.1f} {said.unit} a CPU-second",
            ratio=ratio(mine, theirs),
            command=command,
            machine=machine(),
            dtype=ours.dtype(),
        )
        for peer, theirs in speeds.items()
    ]


if __name__ == "__main__":
    main()
