"""Products by weights: oneDNN's are those of torch, forwards, backwards and in its own order of weights."""

import copy

import pytest
import torch
from torch.nn import functional

from upweight.model import logprobs, products
from upweight.model.config import ModelConfig
from upweight.model.logprobs import token_logprobs
from upweight.model.products import Linear, linear, mm, pack, packed
from upweight.model.transformer import make_model

CONFIG = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, ffn=48, max_context=64, qkv_bias=True)
needs_onednn = pytest.mark.skipif(not products._works(torch.float32), reason="torch without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor is."""
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    for module in (products, logprobs):
        monkeypatch.setattr(module, "faster_in_float32", lambda: True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 32), (1, 1, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], biased: bool) -> None:
    found, expected = [], []
    for results, product in ((found, linear), (expected, functional.linear)):
        x, weight = random(*shape).requires_grad_(), random(48, 32, seed=1).requires_grad_()
        bias = random(48, seed=2).requires_grad_() if biased else None
        out = product(x, weight, bias)
        (out * random(*out.shape, seed=3)).sum().backward()
        results += [out.detach(), x.grad, weight.grad, *([bias.grad] if bias is not None else [])]
        with torch.no_grad():
            results.append(product(x, weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
def test_what_needs_no_gradient_gets_none() -> None:
    weight = random(48, 32, seed=1)
    x = random(4, 32).requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 32), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
def test_plain_products_take_any_strides() -> None:
    for rows, columns in ((7, 9), (9, 7)):
        left, right = random(32, rows), random(columns, 32, seed=1)
        for one in (left, left.t().contiguous().t()):
            for other in (right, right.t().contiguous().t()):
                product = mm(one.t(), other.t())
                torch.testing.assert_close(product, left.t() @ right.t(), rtol=1e-5, atol=1e-5)
    assert mm(torch.zeros(0, 4), torch.zeros(4, 3)).shape == (0, 3)


@needs_onednn
def test_a_model_computes_the_same_by_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities to rounding, and gradients, with every chunk of the head among them."""
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(logprobs, "ROWS_ADDED", 16)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    results = []
    for faster in (True, False):
        for module in (products, logprobs):
            monkeypatch.setattr(module, "faster_in_float32", lambda faster=faster: faster)
        model = make_model(CONFIG, 0)
        values = token_logprobs(model(tokens), model.unembedding, tokens)
        values.sum().backward()
        results.append([values.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_packed_layer_multiplies_as_before_and_holds_its_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if not products._works(torch.bfloat16):
        pytest.skip("oneDNN does not multiply bfloat16 on this processor")
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    layer = Linear(32, 48).to(torch.bfloat16)
    before, x = copy.deepcopy(layer), random(3, 1, 32).to(torch.bfloat16)
    pack(layer, rows=3)
    assert layer.packed is not None
    assert layer.weight.numel() == 0
    with torch.no_grad():
        # 8 bits of mantissa, and sums in another order
        torch.testing.assert_close(layer(x), before(x), rtol=1e-2, atol=1e-2)
        wide = x[:, :, None].expand(3, 1, 5, 32)
        torch.testing.assert_close(layer(wide), before(wide), rtol=1e-2, atol=1e-2)


def test_a_packed_model_samples_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    if not products._works(torch.bfloat16):
        pytest.skip("oneDNN does not multiply bfloat16 on this processor")
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    model = make_model(CONFIG, 0).to(torch.bfloat16)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.logits(model(tokens))
        model.pack(rows=2)
        after = model.logits(model(tokens))
        assert model.unembedding.shape == (61, 32)  # what bits per byte reads
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_packed_where_it_gains_nothing(dtype: torch.dtype) -> None:
    layer = Linear(8, 8).to(dtype)
    pack(layer, rows=1)
    assert layer.packed is None


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
def test_other_precisions_are_left_to_torch() -> None:
    x, weight = random(4, 8).double(), random(3, 8, seed=1).double()
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16


@needs_onednn
def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "faster_in_float32", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda *_: pytest.fail("handed to oneDNN"))
    assert linear(random(63, 128), random(128, 128)).shape == (63, 128)
    with pytest.raises(pytest.fail.Exception):
        linear(random(64, 128), random(128, 128))


@needs_onednn
def test_its_own_order_serves_any_number_of_rows() -> None:
    weight = random(48, 32, seed=1)
    order = packed(weight, 64)
    for rows in (1, 3, 64, 100):
        x = random(rows, 32)
        torch.testing.assert_close(products.by_packed(x, order), functional.linear(x, weight), rtol=1e-5, atol=1e-5)
