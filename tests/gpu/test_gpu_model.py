"""The decoder on CUDA against the same on CPU: packed attention by flex, plain causal attention, decoding, bf16."""

import pytest
import torch

from upweight.core.batches import PADDING
from upweight.model.cache import Cache
from upweight.model.config import ModelConfig
from upweight.model.logprobs import token_logprobs
from upweight.model.transformer import Transformer, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = ModelConfig(vocab_size=97, width=128, layers=2, heads=4, kv_heads=2, ffn=256)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (2, 256), generator=generator)
    segments = torch.full((2, 256), PADDING)
    segments[0, :100], segments[0, 100:256], segments[1, :200] = 0, 1, 2
    return tokens, segments


def loss(model: Transformer, tokens: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    logprobs = token_logprobs(model(tokens, None, segments), model.unembedding, tokens.roll(-1, 1))
    return -(logprobs if segments is None else logprobs[segments != PADDING]).mean()


@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradient_are_those_of_the_cpu(packed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens, segments = batch()
    results = []
    for device in ("cpu", "cuda"):
        model = make_model(SHAPE, 0).to(device)
        value = loss(model, tokens.to(device), segments.to(device) if packed else None)
        value.backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        results.append((value.detach().cpu(), gradients))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-4)
    for theirs, ours in zip(results[0][1], results[1][1], strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_bfloat16_under_autocast_stays_close() -> None:
    tokens, segments = (part.cuda() for part in batch())
    model = make_model(SHAPE, 0).cuda()
    exact = loss(model, tokens, segments).detach()
    with torch.autocast("cuda", torch.bfloat16):
        value = loss(model, tokens, segments)
    value.backward()
    assert abs(value.item() - exact.item()) < 0.02 * exact.item()


def test_decoding_with_a_cache() -> None:
    tokens, _ = batch()
    model = make_model(SHAPE, 0).cuda()
    read = tokens[:, :40].cuda()
    whole = model(read).detach()
    cache = Cache(SHAPE, rows=2, capacity=64, device="cuda")
    model(read[:, :30], cache=cache, counts=[30, 20])
    step = model(torch.stack([read[0, 30:31], read[1, 20:21]]), cache=cache)
    torch.testing.assert_close(step[:, 0], torch.stack([whole[0, 30], whole[1, 20]]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_replayed_as_graphs_are_the_plain_ones(dtype: torch.dtype) -> None:
    """Over shrinking rows and past the length at which a larger graph takes over."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(SHAPE, 0).to("cuda", dtype)
    caches = [Cache(SHAPE, rows=7, capacity=300, device="cuda", dtype=dtype) for _ in range(2)]
    read = torch.randint(0, 97, (6, 125), generator=torch.Generator().manual_seed(1)).cuda()
    for cache in caches:
        model(read, cache=cache, rows=range(6), counts=[125, 100, 7, 125, 1, 60])
    generator = torch.Generator().manual_seed(2)
    for count in (6, 6, 6, 5, 5, 4, 3, 3, 1):
        tokens = torch.randint(0, 97, (count, 1), generator=generator).cuda()
        model.step_graphs = False
        expected = model(tokens, cache=caches[0])
        model.step_graphs = True
        found = model(tokens, cache=caches[1])
        exact = dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4 if exact else 0.05, atol=1e-4 if exact else 0.1)
        assert caches[1].lengths == caches[0].lengths
    assert caches[1].graphs is not None
    assert caches[0].graphs is None


def test_graphs_see_the_weights_of_the_moment_and_free_their_cache() -> None:
    model = make_model(SHAPE, 0).cuda()
    token = torch.ones((2, 1), dtype=torch.long, device="cuda")
    cache = Cache(SHAPE, rows=2, capacity=64, device="cuda")
    first = model(token, cache=cache)
    for row in range(2):
        cache.crop(row, 0)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    torch.testing.assert_close(model(token, cache=cache), 2 * first, rtol=1e-4, atol=1e-5)
    held = torch.cuda.memory_allocated()
    del cache
    assert torch.cuda.memory_allocated() < held
