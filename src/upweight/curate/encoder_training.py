"""Training the transformer tagger: an encoder is fine-tuned by the trainer, and the n-gram tagger trained beside it.

Measured as the n-gram tagger is: both are trained on the documents that are not held back and score the others; what is
kept is trained again on all of them.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.work import Machine, Monitor
from upweight.curate.encoder_tagger import EncoderTagger, ScoreHeads, laid, opened, token_ids
from upweight.curate.tagger_figures import measure
from upweight.curate.tagger_training import Annotated, Looks, Training, fit, held_back
from upweight.objectives.tag_scores import TagBatch, TagScores
from upweight.store.artifact import write_whole
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.loader import EpochLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import train
from upweight.train.watch import watched


@dataclass(frozen=True)
class Tuning:
    """How an encoder is fine-tuned.

    Attributes:
        encoder: its hub name or directory.
        epochs, documents_a_step, learning_rate, warmup_share: linear warmup to the rate, then decay to a tenth.
        documents_a_batch: of one forward pass.
        longest: tokens that are read of a document.
        part: of the encoder in the score, 0-1; the rest is the n-gram tagger's.
        training: of the n-gram tagger.
    """

    encoder: str
    epochs: int = 5
    documents_a_step: int = 32
    documents_a_batch: int = 32
    learning_rate: float = 1e-4
    warmup_share: float = 0.1
    longest: int = 512
    part: float = 0.5
    dtype: str = "float32"
    save_every_steps: int = 50
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(kind="adamw", betas=(0.9, 0.98), weight_decay=0.01)
    )
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not 0 <= self.part <= 1:
            raise UserError(f"part is {self.part}: the encoder's part in the score is a share, 0-1")


_Tagged = tuple[list[int], list[int]]
"""A document's tokens, and its scores."""


def train_encoder(documents: Annotated, tuning: Tuning, out: Path, machine: Machine, monitor: Monitor) -> EncoderTagger:
    """Train a transformer tagger and write it to the directory `out`; a run that was killed goes on where it was.

    Raises UserError where the encoder cannot be opened, and where `out` holds something else.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a directory that is not there yet")
    building = out.with_name(f".{out.name}.building")
    held = held_back(documents.ids, tuning.training.held_back_one_in)
    looks = Looks.of(documents.texts)
    noted = building / "figures.json"
    if noted.exists():
        figures = json.loads(noted.read_text())
    else:
        rows = np.flatnonzero(~held)
        measured = _fit(looks, documents, rows, tuning, building / "measured", machine, monitor, {})
        rest = np.flatnonzero(held)
        figures = {
            "documents": len(documents.ids),
            "trained_on": len(rows),
            **measure(measured, [documents.texts[row] for row in rest], documents.scores[rest], tuning.training.seed),
            "encoder": tuning.encoder,
        }
        write_whole(noted, json.dumps(figures))
    tagger = _fit(looks, documents, np.arange(len(held)), tuning, building / "kept", machine, monitor, figures)
    tagger.save(building / "tagger")
    out.parent.mkdir(parents=True, exist_ok=True)
    (building / "tagger").replace(out)
    shutil.rmtree(building)
    return tagger


def _fit(
    looks: Looks,
    documents: Annotated,
    rows: Int64[np.ndarray, " row"],
    tuning: Tuning,
    directory: Path,
    machine: Machine,
    monitor: Monitor,
    figures: dict[str, Any],
) -> EncoderTagger:
    """A tagger trained on some rows of the documents."""
    model, tokenizer = fine_tuned(documents, rows, tuning, directory, machine, monitor)
    ngrams = fit(looks, documents, rows, tuning.training, figures)
    return EncoderTagger(model, tokenizer, tuning.longest, ngrams, tuning.part, figures)


def fine_tuned(
    documents: Annotated,
    rows: Int64[np.ndarray, " row"],
    tuning: Tuning,
    directory: Path | None,
    machine: Machine,
    monitor: Monitor,
) -> tuple[ScoreHeads, Any]:
    """An encoder with its heads, trained on some rows of the documents, and its tokenizer.

    Args:
        directory: where checkpoints go while it is trained; None keeps none.
    """
    encoder, tokenizer = opened(tuning.encoder)
    limit = int(getattr(encoder.config, "max_position_embeddings", tuning.longest))
    if tuning.longest > limit:
        raise UserError(f"longest is {tuning.longest} tokens, but {tuning.encoder} reads {limit}")
    model = ScoreHeads(encoder)
    tokens = token_ids(tokenizer, [documents.texts[row] for row in rows], tuning.longest)
    labels = np.rint(documents.scores[rows]).astype(int).tolist()

    def batches(chosen: Sequence[_Tagged]) -> list[TagBatch]:
        size = tuning.documents_a_batch
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [
            TagBatch(laid([ids for ids, _ in part]), torch.tensor([scores for _, scores in part])) for part in parts
        ]

    loader = EpochLoader(
        list(zip(tokens, labels, strict=True)),
        batches,
        items_a_step=tuning.documents_a_step,
        epochs=tuning.epochs,
        seed=seed_for(tuning.training.seed, "encoder"),
    )
    reports = train(
        model,
        objective=TagScores(),
        loader=loader,
        timeline=warmup_decay(loader.steps, tuning.learning_rate, tuning.warmup_share),
        optimizer=tuning.optimizer,
        machine=machine,
        checkpoint=CheckpointConfig(directory, every_steps=tuning.save_every_steps) if directory else None,
        dtype=tuning.dtype,
    )
    shown = f"fine-tune on {len(rows):,} documents"
    for _ in watched(reports, monitor, shown, total=loader.steps, unit="steps", machine=machine, dtype=tuning.dtype):
        pass
    return model.eval(), tokenizer
