import numpy as np
import pytest

from upweight.curate import nearest
from upweight.curate.nearest import Nearest

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(230, 16)).astype(np.float32)
QUERIES = RANDOM.normal(size=(5, 16)).astype(np.float32)


@pytest.mark.parametrize("at_once", [7, 64, 1_000])
@pytest.mark.parametrize("order", [[0, 100, 130], [130, 0, 100]])
def test_the_best_are_those_of_brute_force(at_once: int, order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "VECTORS_AT_ONCE", at_once)
    wanted = [np.array(rows, np.int64) for rows in ([3, 229, 0], [], [131], [7, 7], [100])]
    search = Nearest(QUERIES, 10, wanted)
    stops = {0: 100, 100: 130, 130: 230}
    allowed = np.arange(230) % 3 > 0
    only = Nearest(QUERIES, 10, [np.zeros(0, np.int64)] * 5)
    for first in order:
        part = slice(first, stops[first])
        search.see(first, VECTORS[part])
        only.see(first, VECTORS[part], allowed[part])
    products = QUERIES @ VECTORS.T
    for query, (best, among, asked) in enumerate(zip(search.best(), only.best(), search.products(), strict=True)):
        rows = np.argsort(-products[query], kind="stable")
        assert best.rows.tolist() == rows[:10].tolist()
        np.testing.assert_allclose(best.scores, products[query][rows[:10]], rtol=1e-5)
        assert among.rows.tolist() == rows[allowed[rows]][:10].tolist()
        np.testing.assert_allclose(asked, products[query][wanted[query]], rtol=1e-4, atol=1e-5)


def test_all_are_found_where_there_are_fewer_than_asked_for() -> None:
    search = Nearest(QUERIES[:1], 10, [np.zeros(0, np.int64)])
    assert search.best()[0].rows.tolist() == []
    search.see(0, VECTORS[:4])
    search.see(4, VECTORS[4:6])
    assert sorted(search.best()[0].rows.tolist()) == [0, 1, 2, 3, 4, 5]


def test_equal_vectors_come_by_row_once_they_are_kept() -> None:
    search = Nearest(np.ones((1, 2), np.float32), 3, [np.zeros(0, np.int64)])
    search.see(0, np.ones((3, 2), np.float32))
    search.see(3, np.full((1, 2), 2.0, np.float32))
    assert search.best()[0].rows.tolist()[0] == 3
    assert len(search.best()[0].rows) == 3
