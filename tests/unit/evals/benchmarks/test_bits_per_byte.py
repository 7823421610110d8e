"""Bits per byte are the model's own log-probabilities, window by window."""

import math
from pathlib import Path

import pytest
import torch

from upweight.core.errors import UserError
from upweight.core.protocols import REPORTED
from upweight.core.records import Sample
from upweight.evals.setting import Setting, open_named
from upweight.model.config import ModelConfig
from upweight.model.transformer import make_model
from upweight.rollout.local import LocalSampler
from upweight.rollout.scripted import ScriptedSampler
from upweight.text.tokenizer import Tokenizer


def test_against_the_logits(tmp_path: Path) -> None:
    path = tmp_path / "held_out.txt"
    path.write_text("Ann has 3 apples. “Bob” has 5 more." * 3)
    tokenizer = Tokenizer.train(["Ann has 3 apples. “Bob” has 5 more."], 290)
    config = ModelConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, ffn=32, max_context=9)
    sampler = LocalSampler(make_model(config, 0).eval(), tokenizer)
    benchmark = open_named("bits_per_byte", Setting(data=path))
    problems = benchmark.problems()
    ((completion,),) = benchmark.ask(sampler, problems, REPORTED)
    (verdict,) = benchmark.verifier.score(problems[0], [completion])
    tokens = tokenizer.encode(path.read_text())
    total = 0.0
    for start in range(0, len(tokens), 8):  # the context holds the end-of-text token and 8 more
        window = torch.tensor([[tokenizer.end_of_text, *tokens[start : start + 8]]])
        with torch.inference_mode():
            told = sampler.model.logits(sampler.model(window[:, :-1]))[0].log_softmax(-1)
        total -= told[torch.arange(window.shape[1] - 1), window[0, 1:]].double().sum().item()
    assert verdict.score == pytest.approx(total / math.log(2) / len(path.read_bytes()), rel=1e-5)
    assert math.log2(tokenizer.vocab_size) * 0.5 < verdict.score * len(path.read_bytes()) / len(tokens)
    sample = Sample("text-0", 0, verdict.score, verdict.reason, "end", 1, "", path.read_text(), None)
    assert benchmark.figures([sample])["bits per byte of all"] == pytest.approx(verdict.score)


def test_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(UserError, match="needs a field `text`"):
        open_named("bits_per_byte", Setting(data=tmp_path / "a.jsonl")).problems()
    (tmp_path / "a.txt").write_text("x")
    benchmark = open_named("bits_per_byte", Setting(data=tmp_path / "a.txt"))
    with pytest.raises(UserError, match="needs a model's weights"):
        benchmark.ask(ScriptedSampler({"*": ""}), benchmark.problems(), REPORTED)
    with pytest.raises(UserError, match="has no part 'news'"):
        open_named(f"bits_per_byte:news={tmp_path / 'a.txt'}", Setting()).problems()
