"""The watch for reward hacking: figures by hand, and what makes a warning."""

import pytest

from upweight.core.records import Completion, Message, Problem, Rollout, Verdict
from upweight.verify.hacking import figures, repetition, warnings, within_groups

PROBLEM = Problem("p", (Message("user", "?"),))


def rollout(lengths: list[int], scores: list[float], stops: list[str] | None = None) -> Rollout:
    stops = stops or ["end"] * len(lengths)
    completions = [
        Completion(tuple(range(length)), (), "", stop, "p") for length, stop in zip(lengths, stops, strict=True)
    ]
    return Rollout(PROBLEM, tuple(completions), tuple(Verdict(score, "") for score in scores))


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repetition((1, 2, 3)) == 0
    assert repetition(range(10)) == 0
    # 1 1 1 1 1 1: three runs of four, all the same: two of three repeat
    assert repetition((1,) * 6) == pytest.approx(2 / 3)
    # (1 2 3 4) (2 3 4 1) (3 4 1 2) (4 1 2 3) (1 2 3 4): one of five
    assert repetition((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)


def test_length_is_compared_within_groups() -> None:
    assert within_groups([[1.0, 3.0], [10.0, 10.0]]) == [-1, 1, 0, 0]
    # in each group the longer one is right, though the second problem takes longer and is solved less
    found = figures([rollout([2, 6], [0.0, 1.0]), rollout([20, 24], [0.0, 1.0])])
    assert found["length_correlation"] == pytest.approx(1.0)
    # a truncated completion is out of every figure
    cut = figures([rollout([2, 6, 30], [0.0, 1.0, 0.0], ["end", "end", "length"])])
    assert cut["length_correlation"] == pytest.approx(1.0)
    assert "judge" not in found


def test_a_judge_that_disagrees_shows() -> None:
    groups = [rollout([3, 3], [0.0, 1.0]), rollout([3, 3], [1.0, 0.0])]
    against = [[Verdict(1.0, ""), Verdict(0.5, "")], [Verdict(0.0, ""), Verdict(0.5, "")]]
    found = figures(groups, against)
    assert found["judge"] == 0.5
    # deviations of the reward -.5 .5 .5 -.5, of the judge .25 -.25 -.25 .25
    assert found["judge_correlation"] == pytest.approx(-1.0)


def test_warnings() -> None:
    flat, up, down = [0.5] * 12, [0.1 * step for step in range(12)], [1 - 0.1 * step for step in range(12)]
    assert warnings({"reward": up, "judge": up, "mean_length": flat, "repetition": flat}) == []
    (one,) = warnings({"reward": up, "judge": down})
    assert "the reward rose from 0.200 to 0.900 while the held-out judge fell from 0.800 to 0.100" in one
    (one,) = warnings({"mean_length": [10.0] * 6 + [16.0] * 6})
    assert "grew from 10 to 16 tokens" in one
    (one,) = warnings({"repetition": [0.0] * 6 + [0.2] * 6})
    assert "rose from 0.0% to 20.0%" in one
    (one,) = warnings({"length_correlation": [0.0] * 6 + [-0.7] * 6})
    assert "correlation -0.70" in one
    assert warnings({"reward": up[:9], "judge": down[:9]}) == []  # too short to say
    # the judge looks at every fifth step or so: forty steps are eight looks
    (one,) = warnings({"reward": up, "judge": [0.8] * 4 + [0.5] * 4})
    assert "the held-out judge fell from 0.800 to 0.500" in one
    assert warnings({"reward": up, "judge": [0.8, 0.5, 0.5]}) == []
