"""Estimators against closed forms worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.evals.estimators import avg_at_k, maj_at_k, over_runs, paired_difference, pass_at_k


def test_avg_at_k_is_the_mean_of_means_with_problems_as_units() -> None:
    # means of the problems: 1, 0.5, 0, so the mean is 0.5; deviations 0.5, 0, -0.5: variance 0.5 / 2 = 0.25,
    # standard error sqrt(0.25 / 3) = 0.288675, interval 0.5 +- 1.959964 x 0.288675 = 0.5 +- 0.565793
    estimate = avg_at_k([[1, 1], [1, 0], [0, 0]])
    assert estimate.mean == 0.5
    assert estimate.standard_error == pytest.approx(math.sqrt(0.25 / 3), abs=1e-15)
    assert estimate.low == pytest.approx(0.5 - 0.565793, abs=1e-6)
    assert estimate.high == pytest.approx(0.5 + 0.565793, abs=1e-6)
    assert (estimate.problems, estimate.samples) == (3, 2)


def test_one_problem_tells_nothing_about_the_spread() -> None:
    estimate = avg_at_k([[1, 0, 0, 0]])
    assert (estimate.mean, estimate.standard_error, estimate.low) == (0.25, math.inf, -math.inf)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    # by counting every subset: 5 samples, 2 right, k = 2: 10 subsets, 3 of them all wrong: 1 - 3/10 = 0.7
    row = [1.0, 0.0, 0.0, 1.0, 0.0]
    subsets = list(itertools.combinations(row, 2))
    assert pass_at_k([row], 2).mean == pytest.approx(sum(max(s) for s in subsets) / len(subsets)) == pytest.approx(0.7)
    assert pass_at_k([row], 5).mean == 1.0
    assert pass_at_k([[0.0] * 5], 5).mean == 0.0
    assert pass_at_k([row, [0.0] * 5], 1).mean == avg_at_k([row, [0.0] * 5]).mean


def test_maj_at_k_shares_ties_and_gives_no_vote_to_none() -> None:
    # problem 0: "3" twice (wrong) beats "4": 0. problem 1: "4" and "5" tie: (1 + 0) / 2. problem 2: no answer: 0.
    answers = [["3", "3", "4", None], ["4", "5", None, None], [None, None, None, None]]
    scores = [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert maj_at_k(answers, scores).mean == pytest.approx(0.5 / 3)


def test_runs_are_the_units_and_three_of_them_show_little() -> None:
    # deviations -1, 0, 1: variance 1, standard error 1 / sqrt(3); t of 2 degrees of freedom is 4.302653
    over = over_runs([1.0, 2.0, 3.0])
    assert (over.mean, over.runs) == (2.0, (1.0, 2.0, 3.0))
    assert over.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert not over.excludes_zero
    assert over_runs([0.5]).low == -math.inf
    with pytest.raises(UserError, match="no run to average"):
        over_runs([])


def test_paired_difference_takes_the_spread_of_the_problems_out() -> None:
    # means before 0.0, 0.5 and after 0.25, 0.75: each rises by 0.25, so the error is zero
    difference = paired_difference([[0, 0], [1, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]])
    assert (difference.mean, difference.standard_error) == (0.25, 0.0)
    assert difference.excludes_zero
    # differences 1 and -1: mean 0
    assert not paired_difference([[0], [1]], [[1], [0]]).excludes_zero


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([], "no problem"),
        ([[]], "no sample"),
        ([[1, 0], [1]], "problem 1 has 1 samples"),
        ([[float("nan")]], "not finite"),
    ],
)
def test_what_cannot_be_averaged_is_refused(scores: list[list[float]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        avg_at_k(scores)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="pass@3"):
        pass_at_k([[1.0, 0.0]], 3)
    with pytest.raises(UserError, match="paired"):
        paired_difference([[1.0]], [[1.0], [0.0]])
    with pytest.raises(UserError, match="shape"):
        maj_at_k([["1"]], [[1.0, 0.0]])


def test_arrays_and_truth_values_are_scores_too() -> None:
    assert avg_at_k(np.array([[1, 1], [1, 0], [0, 0]])) == avg_at_k([[True, True], [True, False], [False, False]])
