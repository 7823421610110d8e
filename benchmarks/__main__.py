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
from typing import NamedTuple

from benchmarks import ours, peak, peers
from benchmarks.contest import Contender, Turn, contest, ratio
from benchmarks.table import Row, machine, put
from benchmarks.work import CONTEXT, LONG_MEMBER, LONGEST, PROMPTS, RESPONSES, ROWS, SHAPES, SHORTEST, Work

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


DPD: Mapping[str, Contender] = {
    "upweight": ours.dpd,
    "TRL DPOTrainer, which is DPO alone": peers.trl_dpo,
    "upweight, teacher stored": ours.dpd_cached,
}
DPD_LARGE: Mapping[str, Contender] = {"upweight": ours.dpd_large_cached, "upweight, teacher live": ours.dpd_large}
DPO: Mapping[str, Contender] = {"upweight": ours.dpo, "TRL DPOTrainer": peers.trl_dpo}
TOKEN_KL: Mapping[str, Contender] = {"upweight": ours.token_kl, "TRL GKDTrainer, off-policy": peers.trl_gkd}
DPO_135M: Mapping[str, Contender] = {
    "upweight": ours.dpo_long,
    "TRL DPOTrainer": peers.trl_dpo_long,
    "TRL DPOTrainer, reference precomputed": peers.trl_dpo_long_precomputed,
}


class Contest(NamedTuple):
    """The work in words, the shape of the new model (none for SmolLM2-135M), what is counted, and who takes part."""

    work: str
    size: str
    unit: str
    contenders: Mapping[str, Contender]


SFT_LENGTHS = f"samples of {SHORTEST}-{LONGEST}, useful tokens"
PAIR_LENGTHS = f"prompts of {PROMPTS[0]}-{PROMPTS[1]}, responses of {RESPONSES[0]}-{RESPONSES[1]}"
CONTESTS: Mapping[str, Contest] = {
    "pretrain": Contest(f"pretraining 5.5M Llama, {ROWS} x {CONTEXT}", "5.5M", "tokens", PRETRAIN),
    "pretrain-21m": Contest(f"pretraining 21M Llama, {ROWS} x {CONTEXT}", "21M", "tokens", PRETRAIN),
    "sft": Contest(f"SFT 5.5M Llama, {SFT_LENGTHS}", "5.5M", "tokens", SFT),
    "sft-135m": Contest(f"SFT SmolLM2-135M, {SFT_LENGTHS}", "", "tokens", SFT_135M),
    "dpd": Contest(f"DPD, three terms, 5.5M policy and teacher, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPD),
    "dpd-stored": Contest(f"DPD, 5.5M policy, stored 21M teacher, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPD_LARGE),
    "dpo": Contest(f"DPO alone, 5.5M policy, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPO),
    "kl": Contest(f"token KL, 5.5M policy, 21M teacher, 8 samples, {PAIR_LENGTHS}", "5.5M", "samples", TOKEN_KL),
    "dpo-135m": Contest(f"DPO alone, SmolLM2-135M, 1 pair, 2 x {LONG_MEMBER} tokens", "", "pairs", DPO_135M),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("contests", nargs="+", choices=list(CONTESTS))
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
    said = CONTESTS[name]
    if not said.size and not chosen.model:
        sys.exit(f"{name} needs --model DIR, a directory of SmolLM2-135M in Hugging Face format")
    contenders = dict(said.contenders)
    if name.startswith("pretrain"):
        contenders["matrix product"] = peak.matmul
    work = Work(said.work, SHAPES[said.size]) if said.size else Work(said.work, model=chosen.model)
    kept = {key: value for key, value in contenders.items() if key == "upweight" or chosen.only in key}
    turns = contest(kept, work, rounds=chosen.rounds, steps=chosen.steps, warmup=chosen.warmup)
    command = f"python -m benchmarks {name} --rounds {chosen.rounds} --steps {chosen.steps}"
    command += f' --only "{chosen.only}"' if chosen.only else ""
    row = partial(Row, work=work.name, command=command, machine=machine(), dtype=ours.dtype())
    mine = turns.pop("upweight")
    made = []
    for peer, taken in turns.items():
        if peer == "matrix product":
            assert work.shape is not None
            flops = 3 * work.shape.flops_per_token(CONTEXT)
            share = ratio([turn.speed * flops for turn in mine], [turn.speed for turn in taken])
            made.append(
                row(
                    peer="share of the bf16 matrix product",
                    figures=_figures(mine, taken, said.unit, flops),
                    ratio=share,
                )
            )
            continue
        made.append(
            row(peer=peer, figures=_figures(mine, taken, said.unit), ratio=ratio(_speeds(mine), _speeds(taken)))
        )
        if not said.size:
            peaks = ratio([mine[-1].peak_bytes], [taken[-1].peak_bytes])
            figures = f"{mine[-1].peak_bytes / 1e9:.2f} GB against {taken[-1].peak_bytes / 1e9:.2f} GB"
            made.append(row(peer=f"{peer}: peak memory", figures=figures, ratio=peaks))
    return made


def _speeds(turns: list[Turn]) -> list[float]:
    return [turn.speed for turn in turns]


def _figures(mine: list[Turn], theirs: list[Turn], unit: str, flops: float = 0.0) -> str:
    a, b = (sorted(_speeds(turns))[len(turns) // 2] for turns in (mine, theirs))
    if flops:
        return f"{a * flops / 1e9:,.0f} of {b / 1e9:,.0f} GFLOP a CPU-second"
    digits = 0 if min(a, b) >= 100 else 2
    return f"{a:,.{digits}f} against {b:,.{digits}f} {unit} a CPU-second"


if __name__ == "__main__":
    main()
