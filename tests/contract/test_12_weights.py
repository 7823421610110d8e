"""Contract 12: imported weights give the logits of transformers, exported ones are opened by it and give the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from upweight.model import weights
from upweight.model.config import ModelConfig
from upweight.model.transformer import make_model
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama 3.2": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama, heads apart": (LlamaForCausalLM, LlamaConfig(**(SHAPE | {"num_key_value_heads": 6, "head_dim": 10}))),
    "llama, yarn": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16, rope_theta=1e6)),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_both_ways(tmp_path: Path, name: str) -> None:
    kind, config = CASES[name]
    torch.manual_seed(0)
    theirs = kind(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from the initial ones and zeros of norms and biases
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = weights.load(tmp_path / "theirs")
    weights.save(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(0, 97, (2, 150))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1  # else the bound would mean nothing


def test_transformers_stops_where_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a b c d"], 300).with_template(CHATML)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, ffn=24)
    weights.save(make_model(shape, 0), tmp_path)
    tokenizer.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id is None
    assert set(theirs.generation_config.eos_token_id) == {tokenizer.end_of_turn, tokenizer.end_of_text}
    with torch.no_grad():
        theirs.model.embed_tokens.weight[tokenizer.end_of_turn] *= 100  # it predicts itself
        out = theirs.generate(torch.tensor([tokenizer.encode("<|im_end|>")]), max_new_tokens=8, do_sample=False)
    assert out.shape[1] < 9
