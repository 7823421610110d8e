"""Packing: best fit by hand, what a row holds, and which continuations share a prompt."""

import numpy as np
import pytest

from upweight.core.batches import PADDING
from upweight.core.packing import (
    Continuation,
    best_fit,
    branches,
    bundles,
    lay,
    pack,
    pack_bundles,
    places_of,
    strip,
)


def test_best_fit_by_hand() -> None:
    # decreasing: 6 opens row 0 (4 left), 5 row 1 (5 left), 5 fills row 1, 4 fills row 0, 2 opens row 2
    assert best_fit([4, 5, 2, 6, 5], 10) == [[3, 0], [1, 4], [2]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([11], 10)


def test_best_fit_never_overflows_and_keeps_all() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 33, 500)]
    rows = best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert sum(lengths) / (64 * len(rows)) > 0.97


def test_a_row_by_hand() -> None:
    batch = lay([strip([7, 8, 9], [False, True, False]), strip([5, 6], [True, True])], [[1, 0]], 6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [[1, 1, 0, 0, 0, PADDING]]
    assert batch.targets.tolist() == [[6, 0, 8, 9, 0, 0]]
    assert batch.weights.tolist() == [[1, 0, 1, 0, 0, 0]]  # 6 and 8 are trained; the first token of none
    assert batch.token_count == 5


def test_odd_shapes() -> None:
    assert lay([], [[]], 4).token_count == 0
    assert pack([strip([1, 2, 3], [1.0, 1.0, 1.0])], 2).tokens.shape == (1, 3)
    with pytest.raises(ValueError, match="more than 2"):
        lay([strip([1, 2, 3], [True] * 3)], [[0]], 2)
    with pytest.raises(ValueError, match="one each"):
        strip([1, 2], [True])


def test_packed_rows_are_no_longer_than_they_need_to_be() -> None:
    strips = [strip(range(n), [1.0] * n) for n in (7, 6, 5, 4, 3)]
    # 25 places need two rows of up to 20; 7 + 6 and 5 + 4 + 3 are the two shortest
    batch = pack(strips, 20)
    assert batch.tokens.shape == (2, 13)
    assert batch.token_count == 25
    assert pack(strips, 25).tokens.shape == (1, 25)
    lengths = [int(n) for n in np.random.default_rng(1).integers(96, 289, 8)]
    batch = pack([strip(range(n), [1.0] * n) for n in lengths], 512)
    assert batch.tokens.numel() < 1.1 * sum(lengths)


def test_branches_by_hand() -> None:
    strips = branches([7, 8, 9], [([4, 5], [1.0, 0.5]), ([6], [1.0])])
    batch = lay(strips, [[0, 1, 2]], 8, follows={1: 0, 2: 0})
    # the prompt without its last token, then that token before each continuation
    assert batch.tokens.tolist() == [[7, 8, 9, 4, 5, 9, 6, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2, PADDING]]
    assert batch.prefixes is not None
    assert batch.prefixes.tolist() == [[0, 0, 0, 0, 0, 0, 0, PADDING]]
    assert batch.targets.tolist() == [[8, 0, 4, 5, 0, 6, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 0.5, 0, 1, 0, 0]]
    assert batch.to("cpu").prefixes is not None
    assert lay(strips, [[0, 1, 2]], 8).prefixes is None


def test_neighbours_of_one_prompt_are_bundled_as_far_as_they_fit() -> None:
    items = [Continuation(prompt, tokens, [1.0] * len(tokens)) for prompt, tokens in (
        ((1, 2), (3,)), ((1, 2), (3, 3)), ((1, 2), (3, 3, 3)), ((5,), (6,)), ((5,), (7,)), ((1, 2), (4,)),
    )]  # fmt: skip
    # the first two take 1 + (1 + 1) + (1 + 2) = 6 places, with the third 10; a prompt of one token is not shared
    assert bundles(items, 8) == [[0, 1], [2], [3], [4], [5]]
    assert bundles(items, 10) == [[0, 1, 2], [3], [4], [5]]
    assert places_of(items[:2]) == 6
    assert places_of(items[2:3]) == 5
    batch, sequences = pack_bundles([items[:2], items[3:4]])
    assert batch.tokens.tolist() == [[1, 2, 3, 2, 3, 3, 5, 6]]  # one row, since some share
    assert sequences.tolist() == [1, 2, 3]  # 0 is the prompt
    assert batch.weights.tolist() == [[0, 1, 0, 1, 1, 0, 1, 0]]
    apart, sequences = pack_bundles([items[:1], items[3:4]], 4)
    assert apart.tokens.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert sequences.tolist() == [0, 1]


def test_branches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least two"):
        branches([7], [([4], [1.0])])
    strips = branches([7, 8], [([4], [1.0]), ([5], [1.0])])
    with pytest.raises(ValueError, match=r"strip 1 continues strip 0, which does not stand before it in row 0"):
        lay(strips, [[1, 0], [2]], follows={1: 0})
    with pytest.raises(ValueError, match="in row 1"):
        lay(strips, [[0, 1], [2]], follows={1: 0, 2: 0})


def test_a_row_of_one_sequence_needs_no_mask_and_the_batch_finds_out_when_it_leaves_the_host() -> None:
    strips = [strip([1, 2, 3], [1.0] * 3), strip([4, 5], [1.0] * 2)]
    alone, together = lay(strips, [[0], [1]], 4), lay(strips, [[0, 1]], 6)
    assert alone.attended is alone.segments  # nobody has looked yet
    assert alone.to("meta").attended is None
    assert together.to("meta").attended is not None
    assert alone.to("meta").to("meta").attended is None
