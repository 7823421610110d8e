"""Steps of fixed sizes against plain ones, not recorded: sizes and what padded rows do are the same on a CPU."""

import pytest
import torch

from upweight.model.cache import Cache
from upweight.model.config import ModelConfig
from upweight.model.step_graphs import StepGraphs, padded
from upweight.model.transformer import Transformer, make_model

SHAPE = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
CAPACITY = 300
ROWS = 7


def filled(model: Transformer) -> Cache:
    """A cache whose rows hold between nothing and 260 tokens."""
    cache = Cache(SHAPE, rows=ROWS, capacity=CAPACITY)
    counts = [3, 130, 260, 1, 0, 17, CAPACITY]
    tokens = torch.randint(0, 61, (ROWS, CAPACITY), generator=torch.Generator().manual_seed(1))
    model(tokens, cache=cache, rows=range(ROWS), counts=counts)
    return cache


@pytest.fixture
def model() -> Transformer:
    return make_model(SHAPE, 0)


def test_sizes_are_powers_of_two() -> None:
    assert [padded(size) for size in (0, 1, 2, 3, 4, 5, 128, 129)] == [1, 1, 2, 4, 4, 8, 128, 256]


def test_steps_are_those_without_fixed_sizes(model: Transformer) -> None:
    """Over shrinking numbers of rows; what rows beyond them hold stays as it was."""
    plain, fixed = filled(model), filled(model)
    graphs = StepGraphs(fixed, record=lambda step: step)
    generator = torch.Generator().manual_seed(2)
    for count in (6, 6, 5, 3, 3, 2, 1):
        tokens = torch.randint(0, 61, (count, 1), generator=generator)
        expected = model(tokens, cache=plain)
        with torch.no_grad():
            found = graphs.step(model, tokens, fixed)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert fixed.lengths == plain.lengths
    for row, length in enumerate(plain.lengths[:6]):
        for ours, theirs in zip((*fixed.keys, *fixed.values), (*plain.keys, *plain.values), strict=True):
            torch.testing.assert_close(ours[row, :, :length], theirs[row, :, :length], rtol=1e-5, atol=1e-5)


def test_one_recording_for_each_pair_of_sizes(model: Transformer) -> None:
    recorded = []
    cache = Cache(SHAPE, rows=4, capacity=CAPACITY)
    graphs = StepGraphs(cache, record=lambda step: recorded.append(1) or step)
    with torch.no_grad():
        for _ in range(140):
            graphs.step(model, torch.zeros((3, 1), dtype=torch.long), cache)
    assert len(recorded) == 2, "128 places, then 256"


def test_a_full_row_is_refused(model: Transformer) -> None:
    cache = filled(model)
    graphs = StepGraphs(cache, record=lambda step: step)
    with pytest.raises(ValueError, match="would hold 301 tokens"), torch.no_grad():
        graphs.step(model, torch.zeros((7, 1), dtype=torch.long), cache)
