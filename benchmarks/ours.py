"""upweight, through the names that a stage uses."""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from benchmarks.contest import Turns
from benchmarks.work import (
    BLOCKS,
    CONTEXT,
    LEARNING_RATE,
    LONG_MEMBER,
    PAIRS,
    PAIRS_A_STEP,
    ROWS,
    SAMPLES,
    TEACHER,
    Work,
    blocks,
    dtype,
    preferences,
    samples,
)
from upweight.core.protocols import Objective
from upweight.core.work import Machine
from upweight.model.config import ModelConfig
from upweight.model.transformer import Transformer, make_model
from upweight.model.weights import load
from upweight.objectives.dpd import Dpd, EncodedPair, PairBatch, pair_batch
from upweight.objectives.next_token import NextToken
from upweight.stages.teach import hidden_along, likeliest
from upweight.store.shards import Shards, ShardWriter
from upweight.store.signal import Signal, SignalWriter
from upweight.synthesize.encoded import referenced
from upweight.train.batching import Loader
from upweight.train.loader import Encoded, EpochLoader, MixtureLoader, PackedLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Timeline, constant
from upweight.train.trainer import train

ADAMW = OptimizerConfig(kind="adamw")
KEPT = 32
"""Tokens that a stored teacher keeps of each distribution."""

LONG = 10**9
"""More tokens or steps than any contest takes."""


def pretrain(turns: Turns, work: Work) -> None:
    """Pretraining on token shards, layers compiled."""
    _pretrain(turns, work, Machine(compile="on"))


def pretrain_plain(turns: Turns, work: Work) -> None:
    """The same without the compiler."""
    _pretrain(turns, work, Machine(compile="off"))


def _pretrain(turns: Turns, work: Work, machine: Machine) -> None:
    with _shards(work.vocab_size) as shards:
        timeline = constant(total=LONG, lr=LEARNING_RATE, mixture={"text": 1.0}, context=CONTEXT)
        tokens = ROWS * CONTEXT
        loader = MixtureLoader(
            {"text": shards}, timeline, seed=0, batch_tokens=tokens, microbatch_tokens=tokens, most_epochs=float(LONG)
        )
        _take_turns(turns, _model(work), NextToken(), loader, timeline, machine, "tokens")


def sft(turns: Turns, work: Work) -> None:
    """Fine-tuning on packed samples, layers compiled."""
    _sft(turns, work, Machine(compile="on"))


def sft_plain(turns: Turns, work: Work) -> None:
    """The same without the compiler."""
    _sft(turns, work, Machine(compile="off"))


def sft_recomputed(turns: Turns, work: Work) -> None:
    """With activation checkpointing of every layer, for the least memory."""
    _sft(turns, work, Machine(compile="off", recompute=1.0))


def _sft(turns: Turns, work: Work, machine: Machine) -> None:
    items = [Encoded(tuple(tokens), tuple(trained)) for tokens, trained in samples(work.vocab_size, SAMPLES)]
    tokens = ROWS * CONTEXT
    loader = PackedLoader(items, context=CONTEXT, batch_tokens=tokens, microbatch_tokens=tokens, epochs=100, seed=0)
    _take_turns(turns, _model(work), NextToken(), loader, _flat(loader.steps), machine, "tokens")


def dpd(turns: Turns, work: Work) -> None:
    """All three terms, a live teacher of the policy's own size."""
    _distil(turns, work, Dpd(_teacher(work.shape)))


def dpd_cached(turns: Turns, work: Work) -> None:
    """The same with the teacher stored before: 32 tokens of each distribution."""
    _distil(turns, work, Dpd(), stored=_teacher(work.shape))


def dpd_large(turns: Turns, work: Work) -> None:
    """All three terms, a live teacher of 21M."""
    _distil(turns, work, Dpd(_teacher(TEACHER)))


def dpd_large_cached(turns: Turns, work: Work) -> None:
    """The same with the teacher stored before."""
    _distil(turns, work, Dpd(), stored=_teacher(TEACHER))


def dpo(turns: Turns, work: Work) -> None:
    """L_dpo alone, with the reference computed within the step, as often as a peer does."""
    _distil(turns, work, Dpd(positive=0.0, negative=0.0))


def token_kl(turns: Turns, work: Work) -> None:
    """Distillation on given responses from a live teacher of 21M: L_pos alone."""
    _distil(turns, work, Dpd(_teacher(TEACHER), sequence=0.0, negative=0.0))


def dpo_long(turns: Turns, work: Work) -> None:
    """L_dpo alone on one pair of long members, every layer computed again, the reference precomputed."""
    policy = _model(work)
    pairs = referenced(policy, _encoded(work, 8, length=LONG_MEMBER), pairs_a_batch=1)
    _train(turns, policy, pairs, Dpd(positive=0.0, negative=0.0), Machine(compile="off", recompute=1.0), a_step=1)


def _distil(turns: Turns, work: Work, objective: Dpd, stored: Transformer | None = None) -> None:
    policy = _model(work)
    pairs = _encoded(work, PAIRS)
    with tempfile.TemporaryDirectory() as directory:
        signal = None if stored is None else _stored(Path(directory), stored, pairs)
        reference = copy.deepcopy(policy) if objective.sequence else None
        _train(turns, policy, pairs, objective, Machine(compile="off"), signal=signal, reference=reference)


def _train(
    turns: Turns,
    policy: Transformer,
    pairs: Sequence[EncodedPair],
    objective: Dpd,
    machine: Machine,
    *,
    a_step: int = PAIRS_A_STEP,
    signal: Signal | None = None,
    reference: Transformer | None = None,
) -> None:
    def batches(some: Sequence[EncodedPair]) -> list[PairBatch]:
        if reference is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype() == "bfloat16"):
                some = referenced(reference, some, row_tokens=CONTEXT, pairs_a_batch=len(some))
        return [pair_batch(some, CONTEXT, signal, objective.members)]

    loader = EpochLoader(pairs, batches, items_a_step=a_step, epochs=10_000, seed=0)
    _take_turns(turns, policy, objective, loader, _flat(loader.steps), machine, "weight")


def _flat(steps: int) -> Timeline:
    return constant(total=steps, lr=LEARNING_RATE)


def _take_turns(
    turns: Turns,
    policy: Transformer,
    objective: Objective,
    loader: Loader,
    timeline: Timeline,
    machine: Machine,
    counted: Literal["tokens", "weight"],
) -> None:
    """Train until the contest ends, a turn at a time; `counted` is the figure of a step that the contest is about."""
    reports = train(
        policy,
        objective=objective,
        loader=loader,
        timeline=timeline,
        optimizer=ADAMW,
        machine=machine,
        dtype=dtype(),
    )
    for report in reports:
        if not turns.step(getattr(report, counted)):
            return


def _encoded(work: Work, count: int, length: int = 0) -> list[EncodedPair]:
    found = preferences(work.vocab_size, count, length)
    return [EncodedPair(tuple(prompt), tuple(good), tuple(bad)) for prompt, good, bad in found]


def _teacher(shape: ModelConfig | None) -> Transformer:
    assert shape is not None
    return make_model(shape, seed=1).requires_grad_(False)


def _stored(directory: Path, teacher: Transformer, pairs: Sequence[EncodedPair]) -> Signal:
    vocabulary = teacher.config.vocab_size
    writer = SignalWriter(directory / "0", vocabulary=vocabulary, kept=KEPT, temperature=1.0, teacher="seed 1")
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            (hidden,) = hidden_along(teacher, [(pair.prompt, response)])
            writer.write(pair.prompt, response, *likeliest(teacher.logits(hidden), KEPT))
    writer.close()
    return Signal.open(directory)


def _model(work: Work) -> Transformer:
    return load(work.model)[0] if work.shape is None else make_model(work.shape, seed=0)


@contextmanager
def _shards(vocab_size: int) -> Iterator[Shards]:
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory), vocab_size=vocab_size)
        for index, block in enumerate(blocks(vocab_size, BLOCKS)):
            writer.write(block, source="stdlib", document_id=str(index))
        writer.close()
        yield Shards.open(Path(directory), vocab_size=vocab_size)
