"""A checkpoint of a few thousand weights that answers nonsense quickly."""

from pathlib import Path

from upweight.model.config import ModelConfig
from upweight.model.transformer import make_model
from upweight.model.weights import save
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """`folder`/model in Hugging Face format, with tokenizer and chat template."""
    tokenizer = Tokenizer.train(["Ann has 3 apples. “Bob” has 5 more."], 300, chat_template=CHATML)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_size=8, ffn=32, max_context=512
    )
    save(make_model(config, seed), folder / "model")
    tokenizer.save(folder / "model")
    return folder / "model"
