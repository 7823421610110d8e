"""Wrapped models: any causal language model of transformers under the same objectives, loader, sampler and contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from upweight.core.errors import UserError
from upweight.core.packing import branches, lay, pack, strip
from upweight.core.protocols import Limits
from upweight.model import language_model, weights
from upweight.model.foreign import ForeignModel
from upweight.model.hub_config import UnsupportedModel
from upweight.model.logprobs import token_logprobs
from upweight.objectives.next_token import NextToken
from upweight.rollout.local import LocalSampler
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import Optimizer, OptimizerConfig

ROPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128))


KINDS: dict[str, Callable[[], Any]] = {
    "learned positions, dropout": gpt2,
    "partial rotary, parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**ROPE)),
    "a window": lambda: MistralForCausalLM(MistralConfig(**ROPE, num_key_value_heads=2, sliding_window=8)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**ROPE, attention_bias=True)),
}


def saved(tmp_path: Path, make: Callable[[], Any]) -> Path:
    tmp_path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def opened(tmp_path: Path, make: Callable[[], Any]) -> ForeignModel:
    model, config = language_model.load(saved(tmp_path, make))
    assert isinstance(model, ForeignModel)
    assert model.config == config
    return model


@pytest.mark.parametrize("name", KINDS)
def test_logits_agree_both_ways(tmp_path: Path, name: str) -> None:
    model = opened(tmp_path, KINDS[name])
    language_model.save(model, tmp_path / "ours")
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for place in ("theirs", "ours"):
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / place).eval()(tokens).logits
            torch.testing.assert_close(model.logits(model(tokens)), expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_packing_changes_nothing(tmp_path: Path, name: str) -> None:
    model = opened(tmp_path, KINDS[name])
    random = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 300, (length,), generator=random).tolist() for length in (9, 3, 14, 1, 6)]
    strips = [strip(text, [1.0] * len(text)) for text in texts]
    packed = lay(strips, [[2, 1], [0, 4, 3]], 20)  # 14 + 3 and 9 + 6 + 1 of 20 places
    with torch.no_grad():
        hidden = model(packed.tokens, packed.positions, packed.segments)
        for number, text in enumerate(texts):
            alone = model(torch.tensor([text]))[0]
            torch.testing.assert_close(hidden[packed.segments == number], alone, rtol=0, atol=1e-5)
    losses, gradients = [], []
    for batch in (packed, pack(strips, 14)):
        model.zero_grad()
        loss = NextToken()(model, batch)
        loss.total.backward()
        losses.append((float(loss.total.detach()), float(loss.weight)))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] == 8 + 2 + 13 + 0 + 5
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)


def test_a_shared_prompt_is_read_by_all_that_continue_it(tmp_path: Path) -> None:
    model = opened(tmp_path, gpt2)
    prompt, answers = [5, 6, 7], [[8, 9], [10], [11, 12, 13]]
    strips = branches(prompt, [(answer, [1.0] * len(answer)) for answer in answers])
    batch = lay(strips, [[0, 1, 2, 3]], 14, follows={1: 0, 2: 0, 3: 0})
    with torch.no_grad():
        hidden = model(batch.tokens, batch.positions, batch.segments, prefixes=batch.prefixes)
        for number, answer in enumerate(answers, start=1):
            alone = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 :]
            torch.testing.assert_close(hidden[batch.segments == number], alone, rtol=0, atol=1e-5)
        padding = torch.full((1, 4), -1)
        assert model(batch.tokens[:, :4], None, padding).shape == (1, 4, 32)


def test_sampled_logprobs_are_the_trainers(tmp_path: Path) -> None:
    model = opened(tmp_path, gpt2)
    tokenizer = Tokenizer.train(["a b c d"], 263).with_template(CHATML)
    limits = Limits(6, temperature=0.8, top_p=0.9, seed=3)
    prompts = ["a b", "c", "a b c d a"]
    sampler = LocalSampler(model, tokenizer, batch_rows=2)  # fewer rows than completions: rows are copied and refilled
    groups = sampler.sample(prompts, count=2, limits=limits)
    for prompt, group in zip(prompts, groups, strict=True):
        read = tokenizer.encode(prompt)
        for completion in group:
            row = torch.tensor([[*read, *completion.tokens]])
            with torch.no_grad():
                hidden = model(row)[0, len(read) - 1 : -1]
                again = token_logprobs(
                    hidden, model.unembedding, torch.tensor(completion.tokens), temperature=0.8, top_p=0.9
                )
            assert again.tolist() == pytest.approx(completion.logprobs, abs=1e-4)
    wide = LocalSampler(model, tokenizer, batch_rows=8).sample(prompts, count=2, limits=limits)
    assert [[c.tokens for c in group] for group in wide] == [[c.tokens for c in group] for group in groups]


def test_the_head_is_no_matrix_within_the_layers(tmp_path: Path) -> None:
    config = BioGptConfig(**ROPE, tie_word_embeddings=False)
    model = opened(tmp_path, lambda: BioGptForCausalLM(config))
    assert dict(model.named_parameters())["model.output_projection.weight"] is model.unembedding
    muon, rest = Optimizer(model, OptimizerConfig(weight_decay=0.1)).optimizers
    assert not any(model.unembedding is one for one in muon.param_groups[0]["params"])
    (group,) = [group for group in rest.param_groups if any(model.unembedding is one for one in group["params"])]
    assert group["weight_decay"] == 0


def test_rope_and_context_are_its_own(tmp_path: Path) -> None:
    model = opened(tmp_path, KINDS["biases"])
    model.set_rope_base(model.config.rope_base, max_context=64)
    with pytest.raises(UserError, match="keeps its own; set rope_base=0"):
        model.set_rope_base(5e5, max_context=64)
    with pytest.raises(UserError, match="context of 256"):
        model.set_rope_base(model.config.rope_base, max_context=256)


def test_what_would_not_keep_the_contract_is_refused(tmp_path: Path) -> None:
    capped = Gemma2Config(**ROPE, num_key_value_heads=4, head_dim=8, final_logit_softcapping=0.05)
    with pytest.raises(UserError, match="Gemma2ForCausalLM makes its logits in another way"):
        language_model.load(saved(tmp_path / "capped", lambda: Gemma2ForCausalLM(capped)))
    both_ways = BertConfig(**ROPE, is_decoder=False)
    with pytest.raises(UserError, match="BertLMHeadModel"):
        language_model.load(saved(tmp_path / "both", lambda: BertLMHeadModel(both_ways)))


def test_damage_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path, gpt2)
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel; supported: LlamaForCausalLM.*language_model\.load"):
        weights.load(directory)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    with pytest.raises(UserError, match="cannot be opened"):
        language_model.load(directory)
    file.write_bytes(whole)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(UserError, match=r"lacks \d+ weights of a GPT2LMHeadModel"):
        language_model.load(directory)
    unknown = config.replace("GPT2LMHeadModel", "NoneSuch").replace('"gpt2"', '"nonesuch"')
    (directory / "config.json").write_text(unknown)
    with pytest.raises(UserError, match=r"neither as a model of the Llama family nor by this version of transformers"):
        language_model.load(directory)
