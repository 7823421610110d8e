"""Boosted trees with many outputs: grown on random splits, kept as arrays, evaluated for whole batches in numpy.

A tree is grown leaf by leaf, the most useful split first. At a node some features are drawn, each with one threshold
drawn evenly between its least and largest value there (extremely randomised trees, Geurts et al. 2006), and the split
that lowers the summed squared error over all outputs most is taken. One tree serves all outputs, so that outputs with
few clear labels learn from the others. Boosting fits each tree to what the trees before it left over.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Num

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Growth:
    """How trees are grown.

    Attributes:
        rounds: trees.
        rate: the share of the residual that each tree takes away.
        leaves: of a tree, at most.
        depth: of a tree, at most; every walk takes as many steps as the deepest tree has levels.
        feature_share: the share of the features that is drawn at each node.
        row_share: the share of the rows that each tree sees.
        fewest_rows: in a leaf.
    """

    rounds: int = 200
    rate: float = 0.09
    leaves: int = 24
    depth: int = 7
    feature_share: float = 0.5
    row_share: float = 0.6
    fewest_rows: int = 5


class _Split(NamedTuple):
    gain: float
    feature: int
    threshold: float


class Forest(NamedTuple):
    """Trees as arrays. A leaf points to itself, so that every walk may take `depth` steps.

    Attributes:
        roots: the root node of each tree.
        feature, threshold: rows with a value above the threshold go to below + 1, the others to below.
        below: the left child; a leaf holds itself, and a threshold that nothing exceeds.
        value: what a leaf adds to the outputs.
        depth: of the deepest tree.
    """

    roots: Int32[np.ndarray, " tree"]
    feature: Int32[np.ndarray, " node"]
    threshold: Float32[np.ndarray, " node"]
    below: Int32[np.ndarray, " node"]
    value: Float32[np.ndarray, "node output"]
    depth: int

    def predict(self, rows: Float32[np.ndarray, "row feature"]) -> Float32[np.ndarray, "row output"]:
        """The sum over the trees of the value of each row's leaf."""
        out = np.zeros((len(rows), self.value.shape[1]), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            flat, offsets = part.ravel(), (np.arange(len(part), dtype=np.int32) * part.shape[1])[None, :]
            node = np.broadcast_to(self.roots[:, None], (len(self.roots), len(part)))
            for _ in range(self.depth):
                seen = flat.take(self.feature.take(node) + offsets)
                node = self.below.take(node) + (seen > self.threshold.take(node))
            for tree in node:
                out[start : start + _ROWS_AT_ONCE] += self.value[tree]
        return out


def boost(
    rows: Float32[np.ndarray, "row feature"], targets: Num[np.ndarray, "row output"], growth: Growth, seed: int
) -> Forest:
    """Trees whose sum approaches `targets`, which are taken to be centred and scaled."""
    random = np.random.default_rng(seed)
    residual = targets.astype(np.float32).copy()
    trees = []
    for _ in range(growth.rounds):
        chosen = np.flatnonzero(random.random(len(rows)) < growth.row_share)
        tree = _grow(rows, residual, chosen, growth, random)
        residual -= tree.predict(rows)
        trees.append(tree)
    return joined(trees)


def joined(forests: list[Forest]) -> Forest:
    """Several forests as one that predicts their sum."""
    offsets = np.cumsum([0, *(len(forest.feature) for forest in forests[:-1])]).astype(np.int32)
    return Forest(
        np.concatenate([forest.roots + offset for forest, offset in zip(forests, offsets, strict=True)]),
        np.concatenate([forest.feature for forest in forests]),
        np.concatenate([forest.threshold for forest in forests]),
        np.concatenate([forest.below + offset for forest, offset in zip(forests, offsets, strict=True)]),
        np.concatenate([forest.value for forest in forests]),
        max(forest.depth for forest in forests),
    )


def _grow(
    rows: Float32[np.ndarray, "row feature"],
    residual: Float32[np.ndarray, "row output"],
    chosen: Int64[np.ndarray, " member"],
    growth: Growth,
    random: np.random.Generator,
) -> Forest:
    feature, threshold, below, depth = [0], [np.float32(np.inf)], [0], [0]
    members = {0: chosen}
    waiting: list[tuple[float, int, _Split]] = []

    def consider(node: int) -> None:
        if depth[node] == growth.depth:
            return
        split = _best_split(rows, residual, members[node], growth, random)
        if split is not None:
            heapq.heappush(waiting, (-split.gain, node, split))

    consider(0)
    while waiting and len(members) < growth.leaves:
        _, node, split = heapq.heappop(waiting)
        inside = members.pop(node)
        above = rows[inside, split.feature] > split.threshold
        left = len(feature)
        feature[node], threshold[node], below[node] = split.feature, np.float32(split.threshold), left
        for part in (inside[~above], inside[above]):
            members[len(feature)] = part
            below.append(len(feature))
            depth.append(depth[node] + 1)
            feature.append(0)
            threshold.append(np.float32(np.inf))
        consider(left)
        consider(left + 1)
    value = np.zeros((len(feature), residual.shape[1]), np.float32)
    for leaf, inside in members.items():
        value[leaf] = growth.rate * residual[inside].mean(0)
    return Forest(
        np.zeros(1, np.int32),
        np.array(feature, np.int32),
        np.array(threshold, np.float32),
        np.array(below, np.int32),
        value,
        max(depth),
    )


def _best_split(
    rows: Float32[np.ndarray, "row feature"],
    residual: Float32[np.ndarray, "row output"],
    inside: Int64[np.ndarray, " member"],
    growth: Growth,
    random: np.random.Generator,
) -> _Split | None:
    """The best of the drawn splits by gain = |sum left|^2 / n_left + |sum right|^2 / n_right - |sum|^2 / n."""
    if len(inside) < 2 * growth.fewest_rows:
        return None
    drawn = random.permutation(rows.shape[1])[: max(1, int(growth.feature_share * rows.shape[1]))]
    values = rows[np.ix_(inside, drawn)]
    least, most = values.min(0), values.max(0)
    thresholds = (least + random.random(len(drawn), np.float32) * (most - least)).astype(np.float32)
    above = values > thresholds
    targets = residual[inside]
    count = above.sum(0)
    summed = above.T.astype(np.float32) @ targets
    total = targets.sum(0)
    rest = len(inside) - count
    possible = np.minimum(count, rest) >= growth.fewest_rows
    if not possible.any():
        return None
    gain = (summed**2).sum(1) / np.maximum(count, 1) + ((total - summed) ** 2).sum(1) / np.maximum(rest, 1)
    gain = np.where(possible, gain - (total**2).sum() / len(inside), -np.inf)
    best = int(gain.argmax())
    if gain[best] <= 0:
        return None
    return _Split(float(gain[best]), int(drawn[best]), float(thresholds[best]))
