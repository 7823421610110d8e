"""The shuffle without memory: a permutation, another one for each key, and no visible order."""

import pytest

from upweight.train.shuffle import shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000])
def test_every_item_once(count: int) -> None:
    for key in (0, 1, 2**63 - 1):
        assert sorted(shuffled(place, count, key) for place in range(count)) == list(range(count))


def test_keys_give_other_orders() -> None:
    orders = {tuple(shuffled(place, 50, key) for place in range(50)) for key in range(20)}
    assert len(orders) == 20


def test_items_spread_evenly() -> None:
    # the mean place of the first ten items over 400 keys is 49.5 with a standard error of 28.9 / sqrt(4000) = 0.46
    places = [shuffled(place, 100, key * 7919) for key in range(400) for place in range(10)]
    assert abs(sum(places) / len(places) - 49.5) < 2.3  # five standard errors


def test_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        shuffled(5, 5, 0)
