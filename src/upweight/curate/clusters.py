"""Groups of documents that are alike, so that no tier is all of one kind: spherical k-means over their vectors.

    centre_c = the mean of its documents' vectors, scaled to length 1
    cluster(d) = argmax over c of centre_c . vector_d

The centres are fitted on a sample; in double precision, so that the number of threads decides nothing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

ROUNDS = 15


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centres of length 1."""

    centres: Float64[np.ndarray, "cluster width"]

    @classmethod
    def fit(cls, vectors: Float32[np.ndarray, "document width"], count: int, seed: int) -> "Clusters":
        """At most `count` clusters of some documents, fewer where there are fewer documents with a vector."""
        points = vectors[np.linalg.norm(vectors, axis=1) > 0].astype(np.float64)
        if not len(points):
            return cls(np.zeros((1, vectors.shape[1])))
        random = np.random.default_rng(seed)
        found = cls(points[random.permutation(len(points))[:count]])
        for _ in range(ROUNDS):
            cosines = points @ found.centres.T
            nearest = cosines.argmax(1)
            sums = np.zeros_like(found.centres)
            np.add.at(sums, nearest, points)
            # a cluster that has lost its documents begins anew with those that no centre is near to
            empty = np.flatnonzero(np.bincount(nearest, minlength=len(sums)) == 0)
            sums[empty] = points[np.argsort(cosines.max(1), kind="stable")[: len(empty)]]
            found = cls(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12))
        return found

    def of(self, vectors: Float32[np.ndarray, "document width"]) -> Int64[np.ndarray, " document"]:
        """The number of each document's cluster."""
        return np.asarray((vectors.astype(np.float64) @ self.centres.T).argmax(1), np.int64)
