"""distill: DPD from a teacher into the student, on pairs of the teacher's right and the student's own wrong responses.

The reference is the student as it comes in; its log-probabilities of all responses are computed once, before training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from upweight.core.errors import UserError
from upweight.core.packing import sequence_sums
from upweight.core.records import Pair
from upweight.core.work import Estimate, Summary, Work
from upweight.model.divergence import Direction
from upweight.model.language_model import LanguageModel, fingerprint, load, save
from upweight.model.logprobs import token_logprobs
from upweight.objectives.dpd import Dpd, EncodedPair, PairBatch, pair_batch
from upweight.store.jsonl import read_jsonl
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import EpochLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import train
from upweight.train.watch import watched

ALL_PROCESSES = True


@dataclass(frozen=True)
class Config:
    """Attributes:
    beta, sequence, positive, negative, direction, temperature, normalise: of the objective, see objectives/dpd.py.
    epochs: passes over the pairs.
    pairs_a_step, pairs_a_batch: of one optimizer step, and of one forward pass.
    row_tokens: places of a packed row.
    learning_rate, warmup_share: linear warmup to the rate, then linear decay to a tenth.
    """

    beta: float = 0.1
    sequence: float = 1.0
    positive: float = 1.0
    negative: float = 1.0
    direction: Direction = "forward"
    temperature: float = 1.0
    normalise: Literal["token", "sequence"] = "token"
    epochs: int = 1
    pairs_a_step: int = 32
    pairs_a_batch: int = 32
    row_tokens: int = 256
    learning_rate: float = 1.0
    warmup_share: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every_steps: int = 20
    dtype: str = "float32"


def run(config: Config, work: Work) -> Summary:
    """Distil the input "teacher" into the input "model" on the input "pairs" and write `model/`."""
    source, teacher_source = work.inputs["model"] / "model", work.inputs["teacher"] / "model"
    tokenizer, teachers = Tokenizer.load(source), Tokenizer.load(teacher_source)
    if tokenizer.fingerprint != teachers.fingerprint:
        raise UserError(
            f"the student {source} and the teacher {teacher_source} have different tokenizers: token-level "
            "distillation compares them token by token. Use a teacher of the student's tokenizer, or weights "
            "positive=0, negative=0"
        )
    device = work.machine.device
    model, teacher = load(source)[0].to(device), load(teacher_source)[0].to(device)
    teacher.requires_grad_(False)
    pairs = read_jsonl(work.inputs["pairs"] / "pairs.jsonl", Pair)
    if not pairs:
        raise UserError(
            f"{work.inputs['pairs']} holds no pair: no teacher answer was clearly better than the student's"
        )
    encoded = referenced(model, [encode_pair(tokenizer, pair) for pair in pairs], config)

    def batches(chosen: Sequence[EncodedPair]) -> list[PairBatch]:
        size = config.pairs_a_batch
        return [pair_batch(chosen[start : start + size], config.row_tokens) for start in range(0, len(chosen), size)]

    loader = EpochLoader(encoded, batches, items_a_step=config.pairs_a_step, epochs=config.epochs, seed=work.seed)
    reports = train(
        model,
        objective=Dpd(
            teacher,
            beta=config.beta,
            sequence=config.sequence,
            positive=config.positive,
            negative=config.negative,
            direction=config.direction,
            temperature=config.temperature,
            normalise=config.normalise,
        ),
        loader=loader,
        timeline=warmup_decay(loader.steps, config.learning_rate, config.warmup_share),
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    first, last = None, None
    for report in watched(
        reports, work.monitor, "distill", total=loader.steps, unit="steps", machine=work.machine, dtype=config.dtype
    ):
        first, last = first or report, report
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    discard(work.out / "checkpoints")
    return {
        "pairs": len(pairs),
        "steps": loader.steps,
        "first": dict(first.terms) if first else None,
        "last": dict(last.terms) if last else None,
        "weights": fingerprint(model),
    }


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> EncodedPair:
    """The pair as tokens: those that were sampled where the records hold them, else the text and the end of turn."""
    prompt = render(tokenizer, pair.problem.messages)
    chosen, rejected = (
        tuple(member.tokens) or (*tokenizer.encode(member.text), tokenizer.end_of_turn)
        for member in (pair.chosen, pair.rejected)
    )
    return EncodedPair(tuple(prompt), chosen, rejected)


def referenced(model: LanguageModel, pairs: Sequence[EncodedPair], config: Config) -> list[EncodedPair]:
    """The pairs with the log-probabilities of their responses under `model` as it is now."""
    done: list[EncodedPair] = []
    for start in range(0, len(pairs), config.pairs_a_batch):
        part = pairs[start : start + config.pairs_a_batch]
        batch = pair_batch(part, config.row_tokens).to(next(model.parameters()).device)
        sequences = batch.sequences
        with torch.no_grad():
            hidden = model(sequences.tokens, sequences.positions, sequences.segments)
            logprobs = token_logprobs(hidden, model.unembedding, sequences.targets) * sequences.weights
        sums = sequence_sums(logprobs, sequences.segments, len(batch.reference)).tolist()
        done += [
            replace(pair, reference_chosen=sums[2 * index], reference_rejected=sums[2 * index + 1])
            for index, pair in enumerate(part)
        ]
    return done


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Both responses go through student (forwards and backwards), reference and teacher (forwards)."""
    model, teacher = inputs["model"], inputs["teacher"]
    tokens = config.epochs * 2 * 100 * max(1.0, inputs["pairs"].disk_bytes / 2000)
    return Estimate(
        tokens=tokens,
        flops=tokens * (8 * model.parameters + 2 * teacher.parameters),
        memory_bytes=16 * model.parameters + 4 * teacher.parameters + 1e9,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
    )
