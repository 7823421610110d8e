"""Contract 5: the sampler's log-probabilities are those that the trainer computes for the same tokens."""

import pytest
import torch

from upweight.core.protocols import Limits
from upweight.core.records import Completion
from upweight.model.logprobs import token_logprobs
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.rollout import local
from upweight.rollout.local import LocalSampler
from upweight.text.tokenizer import Tokenizer

BOUND_NATS = 1e-4
"""In fp32. What is left is the rounding of matrix products of other shapes."""
EDGE = 1e-5
"""Rounding can also put a token on the other side of the nucleus (about one in 10,000 tokens at top-p 0.9); then all
log-probabilities of that place move by that token's share, as they would under a top-p so much larger or smaller."""

TEXTS = [f"{a} and {b} make {a + b}.\n" for a in range(20) for b in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2, ffn=64, qk_norm=True)
    model = make_model(config, seed=1)
    with torch.no_grad():
        model.norm.weight.mul_(8)  # a distribution with likely and unlikely tokens, as a trained model's
    return model


def recomputed(
    model: Transformer, prompt: list[int], completion: Completion, *, temperature: float, top_p: float
) -> torch.Tensor:
    """As the trainer does: the whole sequence in one pass, the hidden states before each sampled token."""
    tokens = torch.tensor([prompt + list(completion.tokens)])
    with torch.no_grad():
        hidden = model(tokens)[0, len(prompt) - 1 : -1]
        targets = tokens[0, len(prompt) :]
        return token_logprobs(hidden, model.unembedding, targets, temperature=temperature, top_p=top_p)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0.6, 0.95), (1.7, 0.5)])
def test_sampled_logprobs_are_the_trainers(
    model: Transformer, tokenizer: Tokenizer, temperature: float, top_p: float
) -> None:
    prompts = ["3 and 4 make", "1", "12 and 19 make 31.\n7 and"]
    limits = Limits(24, temperature=temperature, top_p=top_p, seed=3)
    # seven rows for twelve completions: groups are cut, and rows are refilled while others are half done
    groups = LocalSampler(model, tokenizer, batch_rows=7).sample(prompts, count=4, limits=limits)
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            read, sampled = tokenizer.encode(prompt), torch.tensor(completion.logprobs)
            differences = [
                (recomputed(model, read, completion, temperature=temperature, top_p=edge) - sampled).abs()
                for edge in ({top_p - EDGE, top_p, top_p + EDGE} if top_p < 1 else {top_p})
            ]
            worst = max(worst, float(torch.stack(differences).amin(0).max()))
    assert worst <= BOUND_NATS


def test_raw_logprobs_are_those_of_the_model_itself(model: Transformer, tokenizer: Tokenizer) -> None:
    limits = Limits(24, temperature=0.6, top_p=0.9, seed=2)
    # more completions than rows, so that rows move while others are half done
    sampler = LocalSampler(model, tokenizer, batch_rows=3, raw_logprobs=True)
    prompt = tokenizer.encode("3 and 4 make")
    for completion in sampler.sample(["3 and 4 make"], count=7, limits=limits)[0]:
        again = recomputed(model, prompt, completion, temperature=1.0, top_p=1.0)
        assert float((again - torch.tensor(completion.raw_logprobs)).abs().max()) <= BOUND_NATS
        assert completion.raw_logprobs != completion.logprobs
    assert LocalSampler(model, tokenizer).sample(["3"], count=1, limits=limits)[0][0].raw_logprobs == ()


BOUND_NATS_BF16 = 0.25
"""In bfloat16 (three significant digits): the sampler computes all of it rounded, the trainer under autocast keeps its
residual stream in float32."""


def test_in_bfloat16_the_bound_is_a_wider_one(model: Transformer, tokenizer: Tokenizer) -> None:
    limits = Limits(24, temperature=0.8, seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = LocalSampler(model, tokenizer, batch_rows=7, dtype="bfloat16")
    prompts = ["3 and 4 make", "12 and 19 make 31.\n7 and"]
    worst, mean = 0.0, []
    for prompt, group in zip(prompts, sampler.sample(prompts, count=6, limits=limits), strict=True):
        for completion in group:
            with torch.autocast("cpu", torch.bfloat16):
                again = recomputed(model, tokenizer.encode(prompt), completion, temperature=0.8, top_p=1.0)
            difference = (again - torch.tensor(completion.logprobs)).abs()
            worst, mean = max(worst, float(difference.max())), [*mean, float(difference.mean())]
    assert 0 < worst <= BOUND_NATS_BF16
    assert sum(mean) / len(mean) < BOUND_NATS_BF16 / 5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_bound_notices_a_forgotten_temperature(model: Transformer, tokenizer: Tokenizer) -> None:
    limits = Limits(24, temperature=0.8, top_p=0.9)
    completion = LocalSampler(model, tokenizer).sample(["3 and 4"], count=1, limits=limits)[0][0]
    sampled = torch.tensor(completion.logprobs)
    prompt = tokenizer.encode("3 and 4")
    for temperature, top_p in ((1.0, 0.9), (0.8, 1.0)):
        again = recomputed(model, prompt, completion, temperature=temperature, top_p=top_p)
        assert float((again - sampled).abs().max()) > 100 * BOUND_NATS


def test_positions_of_refilled_rows_and_shared_prompts_are_right(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one row at a time, several prompts a pass or one: always the same completions
    prompts = ["5 and 6 make 11.\n2 and 2", "7", "9 and 9 make"]
    limits = Limits(16, top_p=0.95, seed=11)
    whole = LocalSampler(model, tokenizer).sample(prompts, count=5, limits=limits)
    alone = LocalSampler(model, tokenizer, batch_rows=1).sample(prompts, count=5, limits=limits)
    monkeypatch.setattr(local, "PREFILL_SCORES", 1)
    single = LocalSampler(model, tokenizer, batch_rows=4).sample(prompts, count=5, limits=limits)
    for one, other in ((whole, alone), (whole, single)):
        assert [[c.tokens for c in group] for group in one] == [[c.tokens for c in group] for group in other]
