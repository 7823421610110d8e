"""A tiny checkpoint and a tiny step's work, for tests of the stages that train."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upweight.core.work import Silent, Work
from upweight.model import weights
from upweight.model.transformer import ModelConfig, make_model
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer


def checkpoint(directory: Path, *, extra: int = 0, context: int = 128, template: str | None = CHATML) -> Path:
    """An artifact with `model/`: a model of 16 features whose embedding has `extra` more rows than there are tokens."""
    tokenizer = Tokenizer.train(
        ["what is 12 + 30? it is 42. sure, the tool says so; high medium\n"] * 20, 290
    ).with_template(template)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size + extra, width=16, layers=1, heads=2, kv_heads=1, ffn=24, max_context=context
    )
    weights.save(make_model(shape, 0), directory / "model")
    tokenizer.save(directory / "model")
    return directory


def work(out: Path, inputs: Mapping[str, Path], **changes: Any) -> Work:
    """What a stage is handed."""
    out.mkdir(parents=True, exist_ok=True)
    return Work(out, inputs, monitor=Silent(), seed=1, **changes)
