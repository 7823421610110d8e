"""upweight, through the names that a stage uses."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.contest import Turns
from benchmarks.work import BLOCKS, CONTEXT, LEARNING_RATE, ROWS, SAMPLES, Work, blocks, samples
from upweight.core.work import Machine
from upweight.model.transformer import Transformer, make_model
from upweight.model.weights import load
from upweight.objectives.next_token import NextToken
from upweight.store.shards import Shards, ShardWriter
from upweight.train.loader import Encoded, MixtureLoader, PackedLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import constant
from upweight.train.trainer import train

ADAMW = OptimizerConfig(kind="adamw")
LONG = 10**9
"""More tokens or steps than any contest takes."""


def dtype() -> str:
    """bfloat16 where the processor multiplies it natively: elsewhere it is several times slower than float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


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
        reports = train(
            _model(work),
            objective=NextToken(),
            loader=loader,
            timeline=timeline,
            optimizer=ADAMW,
            machine=machine,
            dtype=dtype(),
        )
        for report in reports:
            if not turns.step(report.tokens):
                return


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
    reports = train(
        _model(work),
        objective=NextToken(),
        loader=loader,
        timeline=constant(total=loader.steps, lr=LEARNING_RATE),
        optimizer=ADAMW,
        machine=machine,
        dtype=dtype(),
    )
    for report in reports:
        if not turns.step(report.tokens):
            return


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
