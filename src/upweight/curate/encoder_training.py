"""Training the transformer tagger: heads on an encoder, then both together; and the n-gram tagger beside it.

The heads are trained first, on what the encoder as it came makes of the documents, which is computed once: begun
together with heads that know nothing, fine-tuning spoils the encoder before it teaches it anything. With `epochs` 0
the encoder stays as it came.

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
from jaxtyping import Float, Int64
from torch import Tensor, nn

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint, seed_for
from upweight.core.work import Machine, Monitor
from upweight.curate.encoder_tagger import EncoderTagger, ScoreHeads, laid, opened, over_batches, token_ids
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
        head_epochs, head_rate: of the heads alone.
        epochs, learning_rate: of the encoder with its heads.
        documents_a_step, warmup_share: of both; linear warmup to the rate, then decay to a tenth.
        documents_a_batch: of one forward pass of the encoder.
        longest: tokens that are read of a document.
        part: of the encoder in the score, 0-1; the rest is the n-gram tagger's.
        training: of the n-gram tagger.
    """

    encoder: str
    head_epochs: int = 10
    head_rate: float = 1e-3
    epochs: int = 4
    learning_rate: float = 1e-4
    documents_a_step: int = 32
    documents_a_batch: int = 32
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


def train_encoder(documents: Annotated, tuning: Tuning, out: Path, machine: Machine, monitor: Monitor) -> EncoderTagger:
    """Train a transformer tagger and write it to the directory `out`; a run that was killed goes on where it was, one
    with other documents or another tuning begins anew.

    Raises UserError where the encoder cannot be opened, and where `out` holds something else.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a directory that is not there yet")
    building = _begun(out.with_name(f".{out.name}.building"), documents, tuning)
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


def _begun(building: Path, documents: Annotated, tuning: Tuning) -> Path:
    """The directory to build in, without what a run from anything else has left there."""
    wanted = fingerprint([documents.ids, documents.texts, documents.scores.tolist(), tuning])
    mark = building / "of.json"
    if building.exists() and not (mark.exists() and mark.read_text() == json.dumps(wanted)):
        shutil.rmtree(building)
    building.mkdir(parents=True, exist_ok=True)
    write_whole(mark, json.dumps(wanted))
    return building


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
    model = ScoreHeads(encoder).to(machine.device).eval()
    tokens = token_ids(tokenizer, [documents.texts[row] for row in rows], tuning.longest)
    labels = torch.from_numpy(np.rint(documents.scores[rows]).astype(np.int64))
    looks = torch.from_numpy(over_batches(tokens, model.look, model))

    def of_looks(chosen: Sequence[int]) -> list[TagBatch]:
        return [TagBatch(looks[list(chosen)], labels[list(chosen)])]

    def of_tokens(chosen: Sequence[int]) -> list[TagBatch]:
        size = tuning.documents_a_batch
        parts = [list(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        return [TagBatch(laid([tokens[row] for row in part]), labels[part]) for part in parts]

    heads = _Heads(model)
    for name, policy, batches, epochs, rate in (
        ("heads", heads, of_looks, tuning.head_epochs, tuning.head_rate),
        ("encoder", model, of_tokens, tuning.epochs, tuning.learning_rate),
    ):
        if not epochs:
            continue
        seed = seed_for(tuning.training.seed, name)
        loader = EpochLoader(range(len(rows)), batches, items_a_step=tuning.documents_a_step, epochs=epochs, seed=seed)
        reports = train(
            policy,
            objective=TagScores(),
            loader=loader,
            timeline=warmup_decay(loader.steps, rate, tuning.warmup_share),
            optimizer=tuning.optimizer,
            machine=machine,
            checkpoint=CheckpointConfig(directory / name, tuning.save_every_steps) if directory else None,
            dtype=tuning.dtype if name == "encoder" else "float32",
        )
        for _ in watched(reports, monitor, f"{name} on {len(rows):,} documents", total=loader.steps, unit="steps"):
            pass
    return model.eval(), tokenizer


class _Heads(nn.Module):
    """The heads of a model, trained on what its encoder makes of texts."""

    def __init__(self, model: ScoreHeads) -> None:
        super().__init__()
        self.score = model.score
        self._judge = model.judge

    def forward(self, features: Float[Tensor, "document feature"]) -> Float[Tensor, "document dimension score"]:
        return self._judge(features)
