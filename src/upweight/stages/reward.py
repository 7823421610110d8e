"""reward: a pairwise reward model on preference pairs, measured on pairs that it did not see.

The model is our own backbone with a scalar head at the last token, trained with the Bradley-Terry loss.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from upweight.core.errors import UserError
from upweight.core.packing import pack, strip
from upweight.core.records import Pair
from upweight.core.work import Estimate, Summary, Work
from upweight.model.heads import ScalarHead
from upweight.model.weights import fingerprint, load
from upweight.objectives.bradley_terry import BradleyTerry, RankedBatch
from upweight.store.jsonl import read_jsonl
from upweight.text.chat import render, reply_tokens
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import EpochLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import train
from upweight.train.watch import watched
from upweight.verify.pairwise import length_bias

Members = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt with the chosen response, and with the rejected one."""


ALL_PROCESSES = True


@dataclass(frozen=True)
class Config:
    """Attributes:
    file: the pairs, a file of the input "pairs".
    heldout_share: the share of problems, chosen by the hash of their id, that is kept for measuring.
    pairs_a_step, pairs_a_batch: of one optimizer step, and of one forward pass.
    learning_rate, warmup_share: linear warmup to the rate, then linear decay to a tenth.
    """

    file: str = "pairs.jsonl"
    heldout_share: float = 0.1
    epochs: int = 1
    pairs_a_step: int = 32
    pairs_a_batch: int = 32
    row_tokens: int = 256
    learning_rate: float = 1.0
    warmup_share: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every_steps: int = 50
    dtype: str = "float32"


def run(config: Config, work: Work) -> Summary:
    """Train a reward model from the input "model" on the input "pairs" and write `model/` with its scalar head."""
    source = work.inputs["model"] / "model"
    tokenizer = Tokenizer.load(source)
    pairs = read_jsonl(work.inputs["pairs"] / config.file, Pair)
    heldout = [pair for pair in pairs if _is_heldout(pair.problem.id, config.heldout_share)]
    kept = [pair for pair in pairs if not _is_heldout(pair.problem.id, config.heldout_share)]
    if not kept or not heldout:
        raise UserError(
            f"{work.inputs['pairs'] / config.file} has {len(kept)} pairs to train on and {len(heldout)} to measure on: "
            "it takes both; give more pairs or another heldout_share"
        )
    model = ScalarHead(load(source)[0]).to(work.machine.device)

    def batches(chosen: Sequence[Members]) -> list[RankedBatch]:
        size = config.pairs_a_batch
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [ranked_batch(part, config.row_tokens) for part in parts]

    members = [_members(tokenizer, pair) for pair in kept]
    loader = EpochLoader(members, batches, items_a_step=config.pairs_a_step, epochs=config.epochs, seed=work.seed)
    reports = train(
        model,
        objective=BradleyTerry(),
        loader=loader,
        timeline=warmup_decay(loader.steps, config.learning_rate, config.warmup_share),
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    for _ in watched(
        reports, work.monitor, "reward", total=loader.steps, unit="steps", machine=work.machine, dtype=config.dtype
    ):
        pass
    model.save(work.out / "model")
    tokenizer.save(work.out / "model")
    summary = {
        "pairs": len(kept),
        "steps": loader.steps,
        **_measure(model, [_members(tokenizer, pair) for pair in heldout], config),
        "weights": fingerprint(model.transformer),
    }
    discard(work.out / "checkpoints")
    return summary


def _is_heldout(problem_id: str, share: float) -> bool:
    draw = int.from_bytes(hashlib.sha256(f"reward {problem_id}".encode()).digest()[:8], "big")
    return draw < share * 2**64


def _members(tokenizer: Tokenizer, pair: Pair) -> Members:
    prompt = tuple(render(tokenizer, pair.problem.messages))
    chosen, rejected = ((*prompt, *reply_tokens(tokenizer, prompt, member)) for member in (pair.chosen, pair.rejected))
    return chosen, rejected


def ranked_batch(pairs: Sequence[Members], row_tokens: int) -> RankedBatch:
    """The pairs as one packed batch: sequence 2 i is pair i's chosen member, 2 i + 1 its rejected one."""
    strips = [strip(tokens, [True] * len(tokens)) for pair in pairs for tokens in pair]
    numbers = torch.arange(len(pairs))
    return RankedBatch(pack(strips, row_tokens), 2 * numbers, 2 * numbers + 1)


def _measure(model: ScalarHead, pairs: Sequence[Members], config: Config) -> dict[str, float | int | None]:
    """Accuracy on held-out pairs (a tie counts half), and whether the score follows length more than the preferences
    themselves do."""
    differences: list[float] = []
    for start in range(0, len(pairs), config.pairs_a_batch):
        part = pairs[start : start + config.pairs_a_batch]
        batch = ranked_batch(part, config.row_tokens).to(next(model.parameters()).device)
        with torch.no_grad():
            scores = model(batch.sequences.tokens, batch.sequences.positions, batch.sequences.segments)
        differences += (scores[batch.chosen] - scores[batch.rejected]).tolist()
    longer = [len(chosen) - len(rejected) for chosen, rejected in pairs]
    right = [(difference > 0) + 0.5 * (difference == 0) for difference in differences]
    by_length = [one for one, more in zip(right, longer, strict=True) if more > 0]
    return {
        "heldout_pairs": len(pairs),
        "heldout_accuracy": round(sum(right) / len(pairs), 4),
        "accuracy_where_chosen_is_longer": round(sum(by_length) / len(by_length), 4) if by_length else None,
        "length_bias": round(length_bias(differences, longer), 4),
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Both members of each pair go forwards and backwards once an epoch."""
    model = inputs["model"]
    pairs = max(1.0, inputs["pairs"].records.get(config.file, inputs["pairs"].disk_bytes / 2000))
    tokens = config.epochs * 2 * 100 * pairs
    batch = 2 * 100 * min(pairs, config.pairs_a_batch)
    return Estimate(
        tokens=tokens,
        flops=6 * model.parameters * tokens,
        memory_bytes=16 * model.parameters + batch * model.token_bytes + 5e8,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
        token_bytes=model.token_bytes,
    )
