"""Run contests and write their rows into docs/benchmarks.md.

    python -m benchmarks pretrain               # prints the rows
    python -m benchmarks pretrain sft --write   # and puts them into the table
    python -m benchmarks decode grpo sandbox    # sampling, reinforcement, verifying
    python -m benchmarks sft-135m --model DIR   # SmolLM2-135M in Hugging Face format

The peers come with `pip install -e .[bench]`.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import ours, peak, peers, sampling, verifying
from benchmarks.contest import Contender, Turn, contest, ratio
from benchmarks.table import Row, machine, put
from benchmarks.work import CONTEXT, LONG_MEMBER, LONGEST, PROMPTS, RESPONSES, ROWS, SHAPES, SHORTEST, Work, dtype

PRETRAIN: Mapping[str, Contender] = {
    "upweight": ours.pretrain,
    "upweight, not compiled": ours.pretrain_plain,
    "HF Trainer, defaults": peers.hf_trainer,
    "HF Trainer, bf16": peers.hf_trainer_bf16,
    "HF model, plain loop": peers.hf_loop,
    "HF model, compiled": peers.hf_loop_compiled,
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
DECODE: Mapping[str, Contender] = {
    "upweight": sampling.decode,
    "HF generate, dynamic cache": sampling.hf_dynamic,
    "HF generate, static cache": sampling.hf_static,
}
DECODE_UNEVEN: Mapping[str, Contender] = {
    "upweight": sampling.decode_uneven,
    "HF generate, dynamic cache": sampling.hf_uneven,
}
DECODE_135M: Mapping[str, Contender] = {
    "upweight": sampling.decode_group,
    "HF generate, dynamic cache": sampling.hf_group,
}
GRPO: Mapping[str, Contender] = {"upweight": sampling.grpo, "TRL GRPOTrainer": sampling.trl_grpo}
SANDBOX: Mapping[str, Contender] = {
    "upweight": verifying.sandbox,
    "fresh bare interpreter, no isolation": verifying.fresh_interpreter,
}
SECTION = "## Against other trainers on a CPU"
MATRIX_PRODUCT = "share of the matrix product"


class Contest(NamedTuple):
    """One work, and who does it.

    Attributes:
        work: in words.
        size: the shape of the new model; "135M" for SmolLM2-135M, "" where no model takes part.
        unit: what is counted.
        steps: of one turn, unless the command line says otherwise; half as many warm a contender up.
        goal: units a CPU-second, where there is no peer.
    """

    work: str
    size: str
    unit: str
    contenders: Mapping[str, Contender]
    steps: int = 6
    goal: float = 0.0


SFT_LENGTHS = f"samples of {SHORTEST}-{LONGEST}, useful tokens"
DECODED = f"prompts of {sampling.PROMPT_TOKENS}"
PAIR_LENGTHS = f"prompts of {PROMPTS[0]}-{PROMPTS[1]}, responses of {RESPONSES[0]}-{RESPONSES[1]}"
CONTESTS: Mapping[str, Contest] = {
    "pretrain": Contest(f"pretraining 5.5M Llama, {ROWS} x {CONTEXT}", "5.5M", "tokens", PRETRAIN),
    "pretrain-21m": Contest(f"pretraining 21M Llama, {ROWS} x {CONTEXT}", "21M", "tokens", PRETRAIN),
    "sft": Contest(f"SFT 5.5M Llama, {SFT_LENGTHS}", "5.5M", "tokens", SFT),
    "sft-135m": Contest(f"SFT SmolLM2-135M, {SFT_LENGTHS}", "135M", "tokens", SFT_135M),
    "dpd": Contest(f"DPD, three terms, 5.5M policy and teacher, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPD),
    "dpd-stored": Contest(f"DPD, 5.5M policy, stored 21M teacher, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPD_LARGE),
    "dpo": Contest(f"DPO alone, 5.5M policy, 8 pairs, {PAIR_LENGTHS}", "5.5M", "pairs", DPO),
    "kl": Contest(f"token KL, 5.5M policy, 21M teacher, 8 samples, {PAIR_LENGTHS}", "5.5M", "samples", TOKEN_KL),
    "dpo-135m": Contest(f"DPO alone, SmolLM2-135M, 1 pair, 2 x {LONG_MEMBER} tokens", "135M", "pairs", DPO_135M),
    "decode": Contest(
        f"decoding 5.5M, {sampling.PROMPTS} {DECODED}, {sampling.NEW_TOKENS} new tokens", "5.5M", "tokens", DECODE, 1
    ),
    "decode-uneven": Contest(
        f"decoding 5.5M, {2 * sampling.PROMPTS} {DECODED}, 1 to {sampling.LONGEST} new tokens, 32 on average",
        "5.5M",
        "tokens",
        DECODE_UNEVEN,
        1,
    ),
    "decode-135m": Contest(
        f"decoding SmolLM2-135M, a group of 16, {sampling.NEW_TOKENS} new tokens", "135M", "tokens", DECODE_135M, 1
    ),
    "grpo": Contest(
        f"GRPO step 5.5M, {sampling.GROUPS} x {sampling.GROUP} completions of {sampling.NEW_TOKENS}",
        "5.5M",
        "completions",
        GRPO,
        1,
    ),
    "sandbox": Contest("a program that prints a sum", "", "programs", SANDBOX, 1),
    "answers": Contest("plain numbers compared", "", "answers", {"upweight": verifying.answers}, 1, goal=500),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name}: {said.work}" for name, said in CONTESTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("contests", nargs="+", choices=list(CONTESTS), metavar="CONTEST", help="see below")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps, calls or batches of programs of one turn (6 or 1)"
    )
    parser.add_argument("--warmup", type=int, default=0, help="of these before the first turn (half as many)")
    parser.add_argument("--model", default="", help="directory of SmolLM2-135M in Hugging Face format")
    parser.add_argument("--only", default="", help="take the contenders whose names hold this, and upweight")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/benchmarks.md")
    chosen = parser.parse_args()
    for name in chosen.contests:
        rows = _rows(name, chosen)
        for row in rows:
            print(row.line())
        if chosen.write:
            put(rows, Path(__file__).parents[1] / "docs" / "benchmarks.md", SECTION)


def _rows(name: str, chosen: argparse.Namespace) -> list[Row]:
    said = CONTESTS[name]
    large = said.size == "135M"
    if large and not chosen.model:
        sys.exit(f"{name} needs --model DIR, a directory of SmolLM2-135M in Hugging Face format")
    steps = chosen.steps or said.steps
    contenders = dict(said.contenders)
    if name.startswith("pretrain"):
        contenders[MATRIX_PRODUCT] = peak.matmul
    work = Work(said.work, SHAPES.get(said.size), chosen.model)
    kept = {key: value for key, value in contenders.items() if key == "upweight" or chosen.only in key}
    turns = contest(kept, work, rounds=chosen.rounds, steps=steps, warmup=chosen.warmup or (steps + 1) // 2)
    command = f"python -m benchmarks {name} --rounds {chosen.rounds} --steps {steps}"
    command += f' --only "{chosen.only}"' if chosen.only else ""
    row = partial(Row, work=work.name, command=command, machine=machine(), dtype=dtype() if said.size else "one thread")
    mine = turns.pop("upweight")
    speeds = [turn.speed for turn in mine]
    made = []
    if said.goal:
        figures = f"{statistics.median(speeds):,.0f} {said.unit} a CPU-second"
        aim = ratio(speeds, [said.goal] * len(speeds))
        made.append(row(peer=f"goal of {said.goal:,.0f} a CPU-second", figures=figures, ratio=aim))
    for peer, taken in turns.items():
        flops = 0.0
        if peer == MATRIX_PRODUCT:
            assert work.shape is not None
            flops = 3 * work.shape.flops_per_token(CONTEXT)
        figures = _figures(mine, taken, said.unit, flops)
        found = ratio([speed * (flops or 1.0) for speed in speeds], [turn.speed for turn in taken])
        made.append(row(peer=peer, figures=figures, ratio=found))
        if large:
            peaks = ratio([mine[-1].peak_bytes], [taken[-1].peak_bytes])
            figures = f"{mine[-1].peak_bytes / 1e9:.2f} GB against {taken[-1].peak_bytes / 1e9:.2f} GB"
            made.append(row(peer=f"{peer}: peak memory", figures=figures, ratio=peaks))
    return made


def _figures(mine: list[Turn], theirs: list[Turn], unit: str, flops: float = 0.0) -> str:
    a, b = (statistics.median(turn.speed for turn in turns) for turns in (mine, theirs))
    if flops:
        return f"{a * flops / 1e9:,.0f} of {b / 1e9:,.0f} GFLOP a CPU-second"
    digits = 0 if min(a, b) >= 100 else 2
    return f"{a:,.{digits}f} against {b:,.{digits}f} {unit} a CPU-second"


if __name__ == "__main__":
    main()
