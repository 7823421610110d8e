import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.curate.scores import NAMES, Scores
from upweight.curate.seeds import SeedRule, chosen_rows
from upweight.curate.selection import Lift, Tier, place, utilities


def scores_of(*rows: dict[str, int]) -> Scores:
    return Scores(np.asarray([[row.get(name, 0) for name in NAMES] for row in rows], np.uint8))


def test_utility_is_the_weighted_mean_and_what_similarity_may_add() -> None:
    scores = scores_of(
        {"coherence": 9, "safety": 3},
        {"coherence": 9, "safety": 3},
        {"coherence": 9, "safety": 1},
    )
    found = utilities(
        scores,
        np.array([0.5, 0.5, 0.5]),
        ["book", "web", "book"],
        weights={"coherence": 1.0, "safety": 2.0},
        lift=Lift(0.4, trusted_sources=("b*",), floors={"safety": 2}),
    )
    # (9 + 2*3) / (9*3) = 15/27, lifted by 0.4 * 0.5 = 0.2; "web" is not trusted; the third is below the floor, 11/27.
    np.testing.assert_allclose(found, [15 / 27 + 0.2, 15 / 27, 11 / 27])


def test_a_domain_may_weigh_otherwise() -> None:
    scores = scores_of({"coherence": 9, "safety": 3}, {"coherence": 9, "safety": 3})
    none, sources = Lift(0.0), ["math-worked", "web"]

    def found(by_source: dict[str, dict[str, float]]) -> list[float]:
        similarity = np.zeros(2)
        return utilities(
            scores, similarity, sources, weights={"coherence": 1.0}, lift=none, weights_by_source=by_source
        ).tolist()

    assert found({"math-*": {"coherence": 1.0, "safety": 1.0}}) == pytest.approx([12 / 18, 1.0])
    assert found({}) == [1.0, 1.0]
    with pytest.raises(UserError, match=r"'math-worked' fits \['math-\*', '\*-worked'\]"):
        found({"math-*": {"coherence": 1.0}, "*-worked": {"safety": 1.0}})


def test_a_tier_of_some_sources_has_its_share_of_these() -> None:
    placed = place(
        ["a", "b", "c", "d", "e"],
        ["math-x", "math-x", "web", "math-y", "mail"],
        [10, 10, 100, 10, 10],
        [0.3, 0.2, 0.9, 0.1, 0.9],
        [Tier("math", share=0.67, sources=("math-*",)), Tier("rest", sources=("web", "math-*"), min_utility=0.15)],
        {},
    )
    # 0.67 of the 30 bytes of mathematics are 20: a and b. The web has no place there, mail nowhere.
    assert [placement.tier for placement in placed] == ["math", "math", "rest", None, None]
    assert placed[3].reason == "utility below 0.15"
    assert placed[4].reason == "no tier takes its source"


def test_unknown_dimensions_and_empty_weights_are_refused() -> None:
    scores = scores_of({})
    with pytest.raises(UserError, match="no quality dimension"):
        scores.mean({"beauty": 1.0})
    with pytest.raises(UserError, match="not all 0"):
        scores.mean({"safety": 0.0})
    assert scores.missed(0, {"safety": 1}) == "safety below 1"


def test_documents_fall_through_the_tiers_with_a_reason() -> None:
    placed = place(
        ["a", "b", "c", "d", "e", "f"],
        ["x", "x", "y", "y", "y", "x"],
        [10, 10, 10, 10, 10, 10],
        [0.9, 0.8, 0.7, 0.7, 0.1, 0.95],
        [
            Tier("high", max_bytes=30, min_utility=0.5, source_shares={"x": 0.34}),
            Tier("rest", share=0.17, min_utility=0.3),
        ],
        refused={5: "safety below 4"},
    )
    # By utility: f is refused. a: high. b: source x may fill int(0.34 * 30) = 10 bytes of high, and rest has
    # int(0.17 * 60) = 10, so b goes there. c and d tie, by id: c and d fill high (30 of 30). e: below every tier.
    assert [placement.tier for placement in placed] == ["high", "rest", "high", "high", None, None]
    assert placed[4].reason == "utility below 0.3"
    assert placed[5].reason == "safety below 4"


def test_no_cluster_fills_a_tier() -> None:
    tiers = [Tier("high", max_bytes=40, cluster_share=0.5), Tier("rest")]
    placed = place("abcd", ["x"] * 4, [10] * 4, [0.9, 0.8, 0.7, 0.6], tiers, {}, clusters=[7, 7, 7, 2])
    # cluster 7 may fill int(0.5 * 40) = 20 bytes of high: c goes on to the next tier, and d takes its room
    assert [placement.tier for placement in placed] == ["high", "high", "rest", "high"]
    only = place("abc", ["x"] * 3, [10] * 3, [0.9, 0.8, 0.7], tiers[:1], {}, clusters=[7, 7, 7])
    assert only[2] == (None, "cluster fills its share of tier high")


def test_a_full_tier_says_so_and_the_order_of_rows_does_not_matter() -> None:
    ids, utility = ["c", "a", "b"], [0.5, 0.5, 0.5]
    placed = place(ids, ["x"] * 3, [1] * 3, utility, [Tier("only", max_bytes=2)], {})
    # Ties go by id: a and b fit, c does not.
    assert [placement.tier for placement in placed] == [None, "only", "only"]
    assert placed[0].reason == "tier only is full"


def test_tiers_check_themselves() -> None:
    with pytest.raises(UserError, match="leave 0-1"):
        Tier("high", share=40.0)
    with pytest.raises(UserError, match="name of a file"):
        Tier("a/b")
    with pytest.raises(UserError, match="name of its own"):
        place([], [], [], [], [Tier("a"), Tier("a")], {})


def test_seeds_are_the_best_of_their_sources_in_bounded_shares() -> None:
    scores = scores_of(*({"coherence": value} for value in (9, 8, 7, 6, 9)))
    rule = SeedRule(("book", "paper"), floors={"coherence": 6}, weights={"coherence": 1.0}, count=4, source_share=0.5)
    # One source may give 0.5 * 4 = 2: books a and b, not c; the paper d; e is of no wanted source.
    assert chosen_rows(rule, ["a", "b", "c", "d", "e"], ["book", "book", "book", "paper", "web"], scores) == [0, 1, 3]
    with pytest.raises(UserError, match="no document can be a seed"):
        chosen_rows(SeedRule(("film",)), ["a"] * 5, ["book"] * 5, scores)
