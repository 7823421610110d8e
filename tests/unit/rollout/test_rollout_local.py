"""The local sampler: the distribution it draws from, streams of its own, stops, and room made at once."""

import math
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.model.weights import save
from upweight.rollout.local import LocalSampler, draw, open_local
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer

TEXTS = [f"{a} and {b} make {a + b}. Done\n" for a in range(20) for b in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300, chat_template=CHATML)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2, ffn=64, max_context=200)
    return make_model(config, seed=1)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(50_000, 5)
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, uniform, Limits(1))
    counts = torch.bincount(tokens, minlength=5) / 50_000
    # standard deviation of a share at most sqrt(0.25 / 50,000) = 0.0022; four of them
    assert (counts - probabilities).abs().max() < 0.009
    assert counts[1] == 0
    torch.testing.assert_close(logprobs, probabilities[tokens].log())
    # top_p 0.75 keeps 0.5 and 0.3, renormalised to 5/8 and 3/8
    tokens, logprobs = draw(logits, uniform, Limits(1, top_p=0.75))
    assert set(tokens.tolist()) == {0, 2}
    assert abs(float((tokens == 0).float().mean()) - 0.625) < 0.009
    assert math.isclose(float(logprobs[tokens == 2][0]), math.log(3 / 8), rel_tol=1e-5)
    # temperature 0.5 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365
    tokens, logprobs = draw(logits, uniform, Limits(1, temperature=0.5, top_k=3))
    assert set(tokens.tolist()) == {0, 2, 3}
    assert math.isclose(float(logprobs[tokens == 3][0]), math.log(0.0225 / 0.3625), rel_tol=1e-4)
    # min_p 0.4 keeps what has 0.4 x 0.5 = 0.2 at least
    assert set(draw(logits, uniform, Limits(1, min_p=0.4))[0].tolist()) == {0, 2}


def test_the_ends_of_the_uniform_range_draw_tokens_that_have_a_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(3, 4)
    uniform = torch.tensor([0.0, 0.5, 1.0])
    tokens, logprobs = draw(logits, uniform, Limits(1))
    assert tokens.tolist() == [1, 2, 2]
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("vocab", [256, 300])
def test_a_draw_lands_where_the_running_sum_over_the_whole_vocabulary_does(vocab: int) -> None:
    """Also in the last of its blocks, which may be shorter, and around blocks in which nothing may be drawn."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn((1, vocab), generator=generator).expand(20_000, vocab).clone()
    logits[:, 128:256] = -math.inf
    uniform = torch.rand(20_000, generator=generator)
    tokens, _ = draw(logits, uniform, Limits(1))
    exact = torch.softmax(logits[:1].double(), dim=-1).cumsum(dim=-1)
    expected = torch.searchsorted(exact, uniform[None].double(), right=True)[0]
    assert (tokens != expected).float().mean() < 1e-3  # rounding, on the edges between two tokens
    assert int(tokens.max()) < vocab
    assert not ((tokens >= 128) & (tokens < 256)).any()


def test_greedy_takes_the_likeliest_and_is_certain_of_it(model: Transformer, tokenizer: Tokenizer) -> None:
    one, other = LocalSampler(model, tokenizer).sample(["3 and"], count=2, limits=Limits(8, temperature=0.0))[0]
    assert one.tokens == other.tokens
    assert one.logprobs == (0.0,) * len(one.tokens)
    prompt = torch.tensor([tokenizer.encode("3 and")])
    assert one.tokens[0] == int(model.logits(model(prompt)[0, -1]).argmax())


def test_a_completion_depends_on_seed_prompt_and_sample_alone(model: Transformer, tokenizer: Tokenizer) -> None:
    sampler = LocalSampler(model, tokenizer, batch_rows=5, policy="me")
    limits = Limits(12, seed=7)
    alone = sampler.sample(["4 and 4"], count=3, limits=limits)[0]
    among = sampler.sample(["1 and 1", "4 and 4", "2"], count=6, limits=limits)[1]
    assert [c.tokens for c in alone] == [c.tokens for c in among[:3]]
    assert len({c.tokens for c in among}) == 6
    other_seed = sampler.sample(["4 and 4"], count=3, limits=Limits(12, seed=8))[0]
    assert other_seed[0].tokens != alone[0].tokens
    twice = sampler.sample(["4 and 4", "4 and 4"], count=1, limits=limits)
    assert twice[0][0].tokens == alone[0].tokens != twice[1][0].tokens
    assert alone[0].policy == "me"


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_rows_and_change_nothing(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = LocalSampler(model, tokenizer, batch_rows=9)
    prompts, limits = ["1 and 1", "4 and 4", "2", "3 and"], Limits(12, seed=7)
    alone = sampler.sample(prompts, count=5, limits=limits)  # 9 rows are too few to be shared
    monkeypatch.setattr("upweight.rollout.local.SHARE_ROWS", 3)
    at_work = set()
    read = Transformer.forward

    def remember(*given: Any, **named: Any) -> torch.Tensor:
        at_work.add((threading.get_ident(), torch.get_num_threads()))
        return read(*given, **named)

    monkeypatch.setattr(Transformer, "forward", remember)
    shared = sampler.sample(prompts, count=5, limits=limits)
    assert len(at_work) == 3
    assert {threads for _, threads in at_work} == {1}
    assert torch.get_num_threads() == 3
    assert [[c.tokens for c in group] for group in shared] == [[c.tokens for c in group] for group in alone]
    for one, other in zip(chain.from_iterable(shared), chain.from_iterable(alone), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.usefixtures("three_threads")
def test_where_a_thread_fails_the_call_does(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upweight.rollout.local.SHARE_ROWS", 1)
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LocalSampler(model, tokenizer).sample(["1", "2", "3"], count=2, limits=Limits(3))
    assert torch.get_num_threads() == 3


def test_conversations_are_rendered_by_the_template(model: Transformer, tokenizer: Tokenizer) -> None:
    messages = (Message("user", "3 and 4?"),)
    text = tokenizer.decode(render(tokenizer, messages))
    sampler = LocalSampler(model, tokenizer)
    by_messages, by_text = sampler.sample([messages, text], count=1, limits=Limits(6))
    # the same tokens asked twice in one call: the second has another stream, so ask it alone
    (alone,) = sampler.sample([text], count=1, limits=Limits(6))[0]
    assert by_messages[0].tokens == alone.tokens
    # another number of rows is another matrix product, whose last bit depends on the processor
    assert by_messages[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert by_messages[0].tokens != by_text[0].tokens


@pytest.fixture
def cycling(tokenizer: Tokenizer) -> Transformer:
    """A model that writes its vocabulary's successor table: token t is followed by t + 1, and 4 by the end of turn."""
    size = tokenizer.vocab_size
    config = ModelConfig(size, width=size, layers=1, heads=1, kv_heads=1, ffn=2, head_size=2, tied=False)
    model = make_model(config, seed=0)
    with torch.no_grad():
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.zero_()
        model.embedding.weight.copy_(torch.eye(size))
        assert model.head is not None
        model.head.weight.copy_(50 * torch.eye(size).roll(1, 0))
    return model


def test_stops_are_told_apart(cycling: Transformer, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_turn
    letters = tokenizer.encode("abcdefg")
    assert letters == list(range(letters[0], letters[0] + 7))  # single bytes lie side by side in the vocabulary
    sampler = LocalSampler(cycling, tokenizer)
    length = sampler.sample(["a"], count=1, limits=Limits(3))[0][0]
    assert (length.text, length.stop, length.truncated) == ("bcd", "length", True)
    stopped = sampler.sample(["a"], count=1, limits=Limits(9, stop=("zz", "de")))[0][0]
    assert (stopped.text, stopped.stop) == ("bc", "stop")
    assert tokenizer.decode(stopped.tokens) == "bcde"
    at_once = sampler.sample(["a"], count=1, limits=Limits(9, stop=("b",)))[0][0]
    assert (at_once.text, at_once.stop, len(at_once.tokens)) == ("", "stop", 1)
    at_the_limit = sampler.sample(["a"], count=1, limits=Limits(4, stop=("de",)))[0][0]
    assert at_the_limit.stop == "stop"
    assert sampler.sample([tokenizer.token_text(end - 1)], count=1, limits=Limits(9))[0][0].stop == "end"


@pytest.mark.parametrize("stop", ["END", ("END", "")])
def test_a_stop_that_would_end_every_completion_at_once_is_refused(stop: Any) -> None:
    # with the types of arguments checked, as here by default, a text is refused for its type
    with pytest.raises((ValueError, TypeCheckError), match="tuple"):
        Limits(5, stop=stop)


def test_rows_end_at_their_own_time_and_make_room(cycling: Transformer, tokenizer: Tokenizer) -> None:
    # "a" takes four tokens to its stop string, "abc" two; 22 completions pass through four rows
    prompts = ["abc"[: 1 + index % 3] for index in range(11)]
    limits = Limits(5, stop=("f",))
    groups = LocalSampler(cycling, tokenizer, batch_rows=4).sample(prompts, count=2, limits=limits)
    expected = {"a": "bcde", "ab": "cde", "abc": "de"}
    assert [[c.text for c in group] for group in groups] == [[expected[prompt]] * 2 for prompt in prompts]


def test_what_does_not_fit_the_context_is_refused(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="lower max_new_tokens"):
        LocalSampler(model, tokenizer).sample(["1"], count=1, limits=Limits(200))


def test_little_memory_only_means_fewer_rows(model: Transformer, tokenizer: Tokenizer) -> None:
    limits = Limits(10, seed=2)
    roomy = LocalSampler(model, tokenizer).sample(["1 and", "2"], count=3, limits=limits)
    tight = LocalSampler(model, tokenizer, cache_bytes=1).sample(["1 and", "2"], count=3, limits=limits)
    assert [[c.tokens for c in group] for group in roomy] == [[c.tokens for c in group] for group in tight]


def test_nothing_asked_nothing_sampled(model: Transformer, tokenizer: Tokenizer) -> None:
    sampler = LocalSampler(model, tokenizer)
    assert sampler.sample([], count=3, limits=Limits(4)) == []
    assert sampler.sample(["1"], count=0, limits=Limits(4)) == [[]]


def test_a_checkpoint_is_opened_in_the_precision_asked_for(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """bfloat16 stays within what 8 bits of a number allow of float32, and is not float32."""
    save(model, tmp_path)
    tokenizer.save(tmp_path)
    exact, rounded = (open_local(tmp_path, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.model.unembedding.dtype == torch.bfloat16
    again = LocalSampler(exact.model, tokenizer, dtype="bfloat16").sample(["1 and"], count=2, limits=Limits(8))[0]
    assert {one.tokens for one in again} == {
        one.tokens for one in rounded.sample(["1 and"], count=2, limits=Limits(8))[0]
    }
    assert exact.policy == open_local(tmp_path, device="cpu").policy != rounded.policy
    greedy = Limits(1, temperature=0.0)
    assert len(rounded.sample(["1 and"], count=1, limits=greedy)[0][0].tokens) == 1
    tokens = torch.tensor([tokenizer.encode("1 and 2 make")])
    with torch.no_grad():
        one, other = (sampler.model.logits(sampler.model(tokens)).float() for sampler in (exact, rounded))
    assert 0 < float((one - other).abs().max()) < 0.1
