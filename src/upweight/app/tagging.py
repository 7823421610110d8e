"""`upweight tagger`: train the tagger from annotated documents, and score texts with it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from upweight.app.console import ConsoleMonitor
from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.encoder_tagger import open_tagger
from upweight.curate.encoder_training import Tuning, train_encoder
from upweight.curate.tagger_figures import as_markdown
from upweight.curate.tagger_training import read_annotated
from upweight.curate.tagger_training import train_tagger as train_from


def train_tagger(annotated: Path, out: Path, seed: int) -> None:
    """Train, write the weights to `out`, and print how well documents that were held back are scored.

    Raises UserError where `out` cannot be written, before anything is trained.
    """
    if out.is_dir():
        raise UserError(f"{out} is a directory: name the file to write, {out / 'tagger.npz'}")
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(as_markdown(train_from(annotated, out, seed=seed)))
    print(f"wrote {out}")


def train_transformer(annotated: Path, out: Path, tuning: Tuning, machine: Machine) -> None:
    """Fine-tune an encoder, write the tagger to the directory `out`, and print how well held-back documents go."""
    documents = read_annotated(annotated)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    watching = out.with_name(f".{out.name}.watched")
    watching.mkdir(parents=True, exist_ok=True)
    monitor = ConsoleMonitor(Console(), watching, "tagger")
    try:
        tagger = train_encoder(documents, tuning, out, machine, monitor)
    finally:
        monitor.close()
    shutil.rmtree(watching)
    print(as_markdown(tagger.figures))
    print(f"wrote {out}")


def score_files(paths: Sequence[Path], weights: Path | None, device: str = "cpu") -> None:
    """Print one JSON object a file: its path and its score on each dimension. Raises UserError where one is no text."""
    if not paths:
        raise UserError("name at least one text file")
    texts = [_text(path) for path in paths]
    names = [dimension.name for dimension in DIMENSIONS]
    for path, scores in zip(paths, open_tagger(weights, device).score(texts).tolist(), strict=True):
        print(json.dumps({"file": str(path), "scores": dict(zip(names, scores, strict=True))}))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name text files, each of them is one document") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it, or leave it out") from None
