"""Contract 8: avg@k is the mean over problems of the mean over k samples, clustered by problem, whatever the order."""

import math
import random

from upweight.evals.estimators import avg_at_k


def test_duplicated_samples_do_not_narrow_the_interval() -> None:
    # four problems, one sample each; copying each sample eight times adds no knowledge about problems, so the
    # interval must stay. An interval over the 4 x 8 samples as if independent would shrink by sqrt(31/3) = 3.2.
    scores = [[1.0], [0.0], [1.0], [1.0]]
    copied = [row * 8 for row in scores]
    assert avg_at_k(copied).standard_error == avg_at_k(scores).standard_error
    # by hand: mean 0.75, deviations 0.25 x 3 and -0.75: variance (3 / 16 + 9 / 16) / 3 = 0.25, error sqrt(0.25 / 4)
    assert avg_at_k(scores).standard_error == 0.25


def test_order_of_samples_and_problems_changes_not_one_bit() -> None:
    chance = random.Random(0)
    scores = [[chance.random() for _ in range(16)] for _ in range(50)]
    expected = avg_at_k(scores)
    for _ in range(20):
        shuffled = [chance.sample(row, len(row)) for row in scores]
        chance.shuffle(shuffled)
        assert avg_at_k(shuffled) == expected


def test_problems_weigh_the_same() -> None:
    # a problem's weight does not come from how often it is right: (1 + 0 + 0.25) / 3
    assert math.isclose(avg_at_k([[1] * 4, [0] * 4, [1, 0, 0, 0]]).mean, 1.25 / 3)
