"""What is trained: the shapes, and tokens of real text that need no tokenizer."""

import json
import re
import sysconfig
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch

from upweight.core.errors import UserError
from upweight.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Work:
    """One thing to be trained.

    Attributes:
        shape: of a new model.
        model: instead, a directory in Hugging Face format.
    """

    name: str
    shape: ModelConfig | None = None
    model: str = ""

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        if self.shape is not None:
            return self.shape.vocab_size
        return int(json.loads((Path(self.model) / "config.json").read_text())["vocab_size"])


ROWS, CONTEXT = 4, 512
"""One optimizer step of pretraining."""

LEARNING_RATE = 5e-4

SHAPES = {
    "5.5M": ModelConfig(
        vocab_size=4096, width=256, layers=6, heads=8, kv_heads=4, ffn=704, max_context=CONTEXT, norm_epsilon=1e-5
    ),
    "21M": ModelConfig(
        vocab_size=6144, width=512, layers=6, heads=8, kv_heads=4, ffn=1408, max_context=CONTEXT, norm_epsilon=1e-5
    ),
}

BLOCKS = 1024
"""Documents of CONTEXT tokens to pretrain on; a contest that takes more steps reads them again."""

SAMPLES = 1024
"""Fine-tuning samples, likewise."""

SHORTEST, LONGEST = 16, 400
"""Tokens of a fine-tuning sample."""

PROMPT_SHARE = 1 / 3
"""The part of a fine-tuning sample that is read and not trained."""


PAIRS_A_STEP = 8
"""Preference pairs of one optimizer step."""

PAIRS = 256
"""Preference pairs; a contest that takes more steps reads them again."""

PROMPTS, RESPONSES = (32, 96), (64, 192)
"""Tokens of a pair's prompt and of each of its responses, drawn evenly."""

LONG_MEMBER = 1024
"""Tokens of each member of a long pair."""

TEACHER = replace(SHAPES["21M"], vocab_size=SHAPES["5.5M"].vocab_size)
"""A larger teacher of the small policy's vocabulary."""


def dtype() -> str:
    """bfloat16 where the processor multiplies it natively: elsewhere it is several times slower than float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def corpus(vocab_size: int, tokens: int) -> list[int]:
    """The source text of Python's standard library, each word or sign hashed to a token id from 1."""
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        words = re.findall(r"\w+|[^\w\s]|\n", file.read_text(errors="replace"))
        ids += [1 + zlib.crc32(word.encode()) % (vocab_size - 1) for word in words]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise UserError(f"the standard library holds {len(ids):,} tokens, {tokens:,} are asked for")


def blocks(vocab_size: int, count: int) -> list[list[int]]:
    """`count` documents of CONTEXT tokens."""
    ids = corpus(vocab_size, count * CONTEXT)
    return [ids[start : start + CONTEXT] for start in range(0, len(ids), CONTEXT)]


def samples(vocab_size: int, count: int) -> list[tuple[list[int], list[bool]]]:
    """Fine-tuning samples, lengths drawn evenly between SHORTEST and LONGEST: tokens, and which of them are trained."""
    draw = Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    ids = corpus(vocab_size, sum(lengths))
    made = []
    start = 0
    for length in lengths:
        prompt = max(1, round(length * PROMPT_SHARE))
        made.append((ids[start : start + length], [False] * prompt + [True] * (length - prompt)))
        start += length
    return made


def preferences(vocab_size: int, count: int, length: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Preference pairs of real text: prompt, chosen and rejected response.

    Args:
        length: prompt and response together have exactly so many tokens; 0 draws the lengths.
    """
    draw = Random(1)
    sizes = []
    for _ in range(count):
        prompt = draw.randint(*PROMPTS)
        responses = (
            (length - prompt, length - prompt) if length else (draw.randint(*RESPONSES), draw.randint(*RESPONSES))
        )
        sizes.append((prompt, *responses))
    ids = corpus(vocab_size, sum(map(sum, sizes)))
    made, start = [], 0
    for size in sizes:
        parts = []
        for part in size:
            parts.append(ids[start : start + part])
            start += part
        made.append((parts[0], parts[1], parts[2]))
    return made
