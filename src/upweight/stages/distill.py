"""distill: DPD from a teacher into the student, on pairs of the teacher's right and the student's own wrong responses.

The reference is the student as it comes in; its log-probabilities of all responses are computed once, before training.
The teacher runs beside the student (input "teacher"), or was stored by the stage teach (input "signal").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from upweight.core.errors import UserError
from upweight.core.records import Pair
from upweight.core.work import Estimate, Summary, Work
from upweight.model.divergence import Direction
from upweight.model.language_model import LanguageModel, fingerprint, load, save
from upweight.objectives.dpd import Dpd, EncodedPair, PairBatch, pair_batch
from upweight.store.jsonl import read_jsonl
from upweight.store.signal import Signal
from upweight.synthesize.encoded import encode_pair, referenced
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import EpochLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import ends, train
from upweight.train.watch import watched

ALL_PROCESSES = True

ASSUMED_TOKENS = 110
"""Of one response with its prompt, for the plan, where the pairs come from elsewhere."""
COMPARED_PAIRS = 16
"""Of how many pairs teacher and student are asked, before training, how likely the positives are."""


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
    """Distil the input "teacher", or what the input "signal" stored of one, into the input "model" on "pairs"."""
    source = work.inputs["model"] / "model"
    tokenizer = Tokenizer.load(source)
    model = load(source)[0].to(work.machine.device)
    tokenizer.check_fits(model.unembedding.shape[0], str(source))
    teacher, signal = _taught(config, work, tokenizer)
    pairs = read_jsonl(work.inputs["pairs"] / "pairs.jsonl", Pair)
    if not pairs:
        raise UserError(
            f"{work.inputs['pairs']} holds no pair: no teacher answer was clearly better than the student's"
        )
    encoded = [encode_pair(tokenizer, pair) for pair in pairs]
    if config.sequence:
        encoded = referenced(
            model,
            encoded,
            row_tokens=config.row_tokens,
            pairs_a_batch=config.pairs_a_batch,
            dtype=config.dtype,
            monitor=work.monitor,
        )
    likely = None if teacher is None else _likely(model, teacher, encoded, config, work)
    padded = teacher is not None and teacher.unembedding.shape[0] != model.unembedding.shape[0]

    objective = Dpd(
        teacher,
        beta=config.beta,
        sequence=config.sequence,
        positive=config.positive,
        negative=config.negative,
        direction=config.direction,
        temperature=config.temperature,
        normalise=config.normalise,
        vocabulary=tokenizer.vocab_size if padded or signal is not None else None,
    )

    def batches(chosen: Sequence[EncodedPair]) -> list[PairBatch]:
        size = config.pairs_a_batch
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [pair_batch(part, config.row_tokens, signal, objective.members) for part in parts]

    loader = EpochLoader(encoded, batches, items_a_step=config.pairs_a_step, epochs=config.epochs, seed=work.seed)
    reports = train(
        model,
        objective=objective,
        loader=loader,
        timeline=warmup_decay(loader.steps, config.learning_rate, config.warmup_share),
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    for _ in watched(
        reports, work.monitor, "distill", total=loader.steps, unit="steps", machine=work.machine, dtype=config.dtype
    ):
        pass
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    first, last = ends(work.out / "checkpoints")
    summary = {
        "pairs": len(pairs),
        "teacher": "stored" if signal else "live" if teacher else "none",
        "positives_likely": likely,
        "steps": loader.steps,
        "first": dict(first.terms) if first else None,
        "last": dict(last.terms) if last else None,
        "weights": fingerprint(model),
    }
    discard(work.out / "checkpoints")
    return summary


def _likely(
    student: LanguageModel, teacher: LanguageModel, encoded: Sequence[EncodedPair], config: Config, work: Work
) -> dict[str, float]:
    """How likely the positives of some pairs are to both, as the mean log-probability of a response in nats.

    A teacher to whom they are less likely than to the student is said aloud: both terms pull the student to it.
    """
    some = encoded[:: max(1, len(encoded) // COMPARED_PAIRS)][:COMPARED_PAIRS]
    rows, size, dtype = config.row_tokens, config.pairs_a_batch, config.dtype
    of_teacher = referenced(teacher, some, row_tokens=rows, pairs_a_batch=size, dtype=dtype)
    of_student = some
    if not config.sequence:
        of_student = referenced(student, some, row_tokens=rows, pairs_a_batch=size, dtype=dtype)
    found = {
        name: fmean(pair.reference_chosen for pair in told)
        for name, told in (("student", of_student), ("teacher", of_teacher))
    }
    if found["teacher"] < found["student"]:
        work.monitor.say(
            f"the teacher gives the positives of {len(some)} pairs {found['teacher']:.1f} nats a response, the student "
            f"{found['student']:.1f}: distilling from a teacher that knows the right answers less well than the "
            "student does makes the student worse. Use a better teacher, or positive=0, negative=0 (DPO)"
        )
    return {name: round(value, 4) for name, value in found.items()}


def _taught(config: Config, work: Work, tokenizer: Tokenizer) -> tuple[LanguageModel | None, Signal | None]:
    """The live teacher or the stored one, checked against the student's tokenizer; neither where no term asks."""
    if not config.positive and not config.negative:
        return None, None
    if "signal" in work.inputs:
        signal = Signal.open(work.inputs["signal"] / "signal")
        if signal.temperature != config.temperature:
            raise UserError(
                f"the teacher was stored at temperature {signal.temperature} and is asked for at {config.temperature}: "
                "give the teach step and the distill step one temperature"
            )
        if signal.vocabulary != tokenizer.vocab_size:
            raise UserError(
                f"the teacher was stored for a tokenizer of {signal.vocabulary:,} tokens, the student's has "
                f"{tokenizer.vocab_size:,}: run teach with this student as its input 'model'"
            )
        return None, signal
    if "teacher" not in work.inputs:
        raise UserError(
            f"the weights positive={config.positive} and negative={config.negative} ask for a teacher, but the step "
            "has neither an input 'teacher' (a checkpoint) nor 'signal' (what the stage teach stored): add one, or set "
            "both weights to 0"
        )
    source = work.inputs["teacher"] / "model"
    own = Tokenizer.load(source)
    if own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the student {work.inputs['model'] / 'model'} and the teacher {source} have different tokenizers: "
            "token-level distillation compares them token by token. Use a teacher of the student's tokenizer; or store "
            "the teacher with the stage teach and alignment='spans', which compares where their tokens coincide; or "
            "set positive=0, negative=0"
        )
    teacher = load(source)[0].to(work.machine.device).eval()
    own.check_fits(teacher.unembedding.shape[0], str(source))
    return teacher.requires_grad_(False), None


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Both responses of each pair with their prompts go through student (forwards and backwards), reference and teacher
    (forwards), a few pairs at a time, in rows that are filled up. All that a batch keeps is held at once."""
    model, teacher = inputs["model"], inputs.get("teacher", Estimate())
    pairs = max(1.0, inputs["pairs"].records.get("pairs.jsonl", inputs["pairs"].disk_bytes / 2000))
    member = inputs["pairs"].record_tokens or ASSUMED_TOKENS
    rows = math.ceil(min(pairs, config.pairs_a_batch) * 2 * member / config.row_tokens)
    batch = rows * config.row_tokens
    tokens = config.epochs * batch * math.ceil(pairs / config.pairs_a_batch)
    return Estimate(
        tokens=tokens,
        flops=tokens * (8 * model.parameters + 2 * teacher.parameters),
        memory_bytes=16 * model.parameters + 4 * teacher.parameters + batch * model.token_bytes + 5e8,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
        token_bytes=model.token_bytes,
        held_bytes=model.held_bytes,
    )
