import numpy as np

from upweight.curate.forest import Forest, Growth, boost, joined


def test_a_tree_is_walked_by_hand() -> None:
    # Root: feature 1 above 0.5? No: leaf 1 (10). Yes: node 2, feature 0 above 2? No: leaf 3 (20). Yes: leaf 4 (30).
    forest = Forest(
        roots=np.array([0], np.int32),
        feature=np.array([1, 0, 0, 0, 0], np.int32),
        threshold=np.array([0.5, np.inf, 2.0, np.inf, np.inf], np.float32),
        below=np.array([1, 1, 3, 3, 4], np.int32),
        value=np.array([[0], [10], [0], [20], [30]], np.float32),
        depth=2,
    )
    rows = np.array([[9, 0], [2, 1], [3, 1], [9, 0.5]], np.float32)
    assert forest.predict(rows)[:, 0].tolist() == [10, 20, 30, 10]
    assert joined([forest, forest]).predict(rows)[:, 0].tolist() == [20, 40, 60, 20]


def test_boosting_learns_what_a_line_cannot() -> None:
    random = np.random.default_rng(0)
    rows = random.random((800, 6), np.float32)
    target = np.sign((rows[:, 0] - 0.5) * (rows[:, 1] - 0.5))
    targets = np.stack([target, -target], 1)
    forest = boost(rows[:600], targets[:600], Growth(rounds=80, rate=0.2, leaves=8, feature_share=1.0), seed=0)
    right = (np.sign(forest.predict(rows[600:])) == targets[600:]).mean()
    assert right > 0.9


def test_same_seed_same_trees_and_rows_do_not_touch_each_other() -> None:
    random = np.random.default_rng(1)
    rows, targets = random.random((300, 5), np.float32), random.random((300, 2))
    growth = Growth(rounds=5, leaves=6)
    first, second = boost(rows, targets, growth, 3), boost(rows, targets, growth, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    np.testing.assert_array_equal(first.predict(rows)[17:18], first.predict(rows[17:18]))


def test_few_rows_give_a_single_leaf() -> None:
    forest = boost(np.ones((4, 2), np.float32), np.ones((4, 1)), Growth(rounds=1, rate=1.0, row_share=1.0), 0)
    assert forest.depth == 0
    assert forest.predict(np.zeros((2, 2), np.float32)).tolist() == [[1.0], [1.0]]
