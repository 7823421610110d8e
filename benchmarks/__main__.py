"""Run contests and write their rows into docs/benchmarks.md.

    python -m benchmarks pretrain               # prints the rows
    python -m benchmarks pretrain sft --write   # and puts them into the table
    python -m benchmarks sft-135m --model DIR   # SmolLM2-135M in Hugging Face format

The peers come with `pip install -e .[bench]`.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks import ours, peak, peers
from benchmarks.contest import Contender, Turn, contest, ratio
from benchmarks.table import Row, machine, put
from benchmarks.work import CONTEXT, LONGEST, ROWS, SHAPES, SHORTEST, Work

PRETRAIN: Mapping[str, Contender] = {
    "upweight": ours.pretrain,
    "upweight, not compiled": ours.pretrain_plain,
    "HF Trainer, defaults": peers.hf_trainer,
    "HF Trainer, bf16": peers.hf_trainer_bf16,
    "HF model, plain loop, bf16": peers.hf_loop_bf16,
    "HF model, bf16, compiled": peers.hf_loop_compiled,
}
SFT: Mapping[str, Contender] = {
    "upweight": ours.sft,
    "upweight, not compiled": ours.sft_plain,
    "TRL, padding": peers.trl_padding,
    "TRL, packing": peers.trl_packing,
    "TRL, padding_free": peers.trl_padding_free,
}
SFT_135M: Mapping[str, Contender] = {
    "upweight": ours.sft_recomputed,
    "TRL, packing, its default of checkpointing": peers.trl_packing_checkpointed,
    "TRL, packing, no checkpointing": peers.trl_packing,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("contests", nargs="+", choices=["pretrain", "pretrain-21m", "sft", "sft-135m"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--model", default="", help="directory of SmolLM2-135M in Hugging Face format")
    parser.add_argument("--only", default="", help="take the contenders whose names hold this, and upweight")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    chosen = parser.parse_args()
    for name in chosen.contests:
        rows = _rows(name, chosen)
        for row in rows:
            print(row.line())
        if chosen.write:
            put(rows, Path(__file__).parents[1] / "docs" / "benchmarks.md")


def _rows(name: str, chosen: argparse.Namespace) -> list[Row]:
    size = {"pretrain": "5.5M", "pretrain-21m": "21M", "sft": "5.5M"}.get(name, "")
    if name == "sft-135m" and not chosen.model:
        sys.exit("sft-135m needs --model DIR, a directory of SmolLM2-135M in Hugging Face format")
    contenders = dict({"sft": SFT, "sft-135m": SFT_135M}.get(name, PRETRAIN))
    if name.startswith("pretrain"):
        contenders["matrix product"] = peak.matmul
        work = Work(f"pretraining {size} Llama, {ROWS} x {CONTEXT}", SHAPES[size])
    elif size:
        work = Work(f"SFT {size} Llama, samples of {SHORTEST}-{LONGEST}, useful tokens", SHAPES[size])
    else:
        work = Work(f"SFT SmolLM2-135M, samples of {SHORTEST}-{LONGEST}, useful tokens", model=chosen.model)
    kept = {key: value for key, value in contenders.items() if key == "upweight" or chosen.only in key}
    turns = contest(kept, work, rounds=chosen.rounds, steps=chosen.steps, warmup=chosen.warmup)
    command = f"python -m benchmarks {name} --rounds {chosen.rounds} --steps {chosen.steps}"
    row = partial(Row, work=work.name, command=command, machine=machine(), dtype=ours.dtype())
    mine = turns.pop("upweight")
    made = []
    for peer, taken in turns.items():
        if peer == "matrix product":
            assert work.shape is not None
            flops = 3 * work.shape.flops_per_token(CONTEXT)
            share = ratio([turn.speed * flops for turn in mine], [turn.speed for turn in taken])
            made.append(row(peer="share of the bf16 matrix product", figures=_figures(mine, taken, flops), ratio=share))
            continue
        made.append(row(peer=peer, figures=_figures(mine, taken), ratio=ratio(_speeds(mine), _speeds(taken))))
        if name == "sft-135m":
            peaks = ratio([mine[-1].peak_bytes], [taken[-1].peak_bytes])
            figures = f"{mine[-1].peak_bytes / 1e9:.2f} GB against {taken[-1].peak_bytes / 1e9:.2f} GB"
            made.append(row(peer=f"{peer}: peak memory", figures=figures, ratio=peaks))
    return made


def _speeds(turns: list[Turn]) -> list[float]:
    return [turn.speed for turn in turns]


def _figures(mine: list[Turn], theirs: list[Turn], flops: float = 0.0) -> str:
    a, b = (sorted(_speeds(turns))[len(turns) // 2] for turns in (mine, theirs))
    if flops:
        return f"{a * flops / 1e9:,.0f} of {b / 1e9:,.0f} GFLOP a CPU-second"
    return f"{a:,.0f} against {b:,.0f} tokens a CPU-second"


if __name__ == "__main__":
    main()
