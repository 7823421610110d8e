import numpy as np

from upweight.curate.clusters import Clusters


def _vectors(seed: int = 0) -> np.ndarray:
    """60 around each of three directions, and one without a word."""
    random = np.random.default_rng(seed)
    centres = np.eye(3, 8).repeat(60, axis=0)
    found = centres + 0.1 * random.normal(size=centres.shape)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return np.concatenate([found, np.zeros((1, 8))]).astype(np.float32)


def test_documents_that_are_alike_share_a_cluster() -> None:
    vectors = _vectors()
    labels = Clusters.fit(vectors, 3, seed=1).of(vectors)
    groups = [set(labels[start : start + 60].tolist()) for start in (0, 60, 120)]
    assert sorted(map(len, groups)) == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_there_may_be_fewer_documents_than_clusters_and_none_with_a_word() -> None:
    few = _vectors()[:2]
    assert len(Clusters.fit(few, 10, seed=1).centres) == 2
    empty = np.zeros((3, 8), np.float32)
    assert Clusters.fit(empty, 10, seed=1).of(empty).tolist() == [0, 0, 0]
