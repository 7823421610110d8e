from pathlib import Path
from random import Random

import numpy as np
import pytest

from upweight.core.records import Document
from upweight.curate.embed import HashedEmbedder
from upweight.curate.postings import Ranked
from upweight.curate.retrieval import Database, Embedded, Hit, Seed, brute_force, closest, fusion

WORDS = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("ale", "ine", "oru", "umi", "eth", "ock", "arn")]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    random = Random(0)
    texts = [" ".join(random.choices(WORDS, k=40)) for _ in range(300)]
    return [Document(f"d{row:03d}", text, "odd" if row % 2 else "even") for row, text in enumerate(texts)]


@pytest.fixture(scope="module")
def embedder(documents: list[Document]) -> HashedEmbedder:
    embedder = HashedEmbedder()
    embedder.count(document.text for document in documents)
    return embedder


@pytest.fixture(scope="module")
def database(documents: list[Document], embedder: HashedEmbedder, tmp_path_factory: pytest.TempPathFactory) -> Database:
    database = Database(tmp_path_factory.mktemp("database"), embedder)
    database.add(Embedded.by(embedder, part) for part in (documents[:200], [], documents[200:]))
    return database


def test_ranks_fuse_by_the_equation() -> None:
    first = Ranked(np.array([7, 3, 5]), np.array([0.9, 0.5, 0.5]))
    second = Ranked(np.array([3, 4]), np.array([12.0, 3.0]))
    fused = fusion([first, second])
    # 7: 1/61. 3: second in the first list, first in the other: 1/62 + 1/61. 5 ties with 3: 1/62. 4: 1/62.
    assert fused.rows.tolist() == [3, 4, 5, 7]
    assert fused.scores == pytest.approx([1 / 62 + 1 / 61, 1 / 62, 1 / 62, 1 / 61])


def test_similarity_is_the_closest_seed_that_hit() -> None:
    assert closest([[Hit("a", 0.1, 0.4), Hit("b", 0.1, 0.2)], [Hit("a", 0.1, 0.7)]]) == {"a": 0.7, "b": 0.2}


def test_the_vector_search_finds_what_brute_force_finds(
    documents: list[Document], embedder: HashedEmbedder, database: Database
) -> None:
    texts = [document.text for document in documents]
    vectors = embedder.embed(texts)
    exact = brute_force(vectors, vectors[:20], 10)
    # Seeds without key words are searched for by vector alone, and below 200,000 documents that search is exact.
    found = database.search([Seed(text) for text in texts[:20]], hits=10)
    for hits, best in zip(found, exact, strict=True):
        assert [hit.document_id for hit in hits] == [documents[row].id for row, _ in best]
        np.testing.assert_allclose([hit.cosine for hit in hits], [cosine for _, cosine in best], atol=1e-5)


def test_words_find_what_vectors_miss_with_its_true_cosine(
    documents: list[Document], embedder: HashedEmbedder, database: Database
) -> None:
    text = documents[7].text
    by_vector = {hit.document_id for hit in database.search([Seed(text)], hits=5)[0]}
    hits = database.search([Seed(text, ("bale", "tarn"))], hits=20)[0]
    only_words = [hit for hit in hits if hit.document_id not in by_vector]
    assert only_words
    stored = embedder.embed([document.text for document in documents])
    for hit in hits:
        cosine = float(stored[int(hit.document_id[1:])] @ stored[7])
        assert hit.cosine == pytest.approx(max(0.0, cosine), abs=1e-5)


def test_a_condition_bounds_the_search_and_the_database_can_be_reopened(
    documents: list[Document], embedder: HashedEmbedder, tmp_path: Path
) -> None:
    first = Database(tmp_path, embedder)
    first.add([Embedded.by(embedder, documents[:50])])
    again = Database(tmp_path, embedder)
    again.add([Embedded.by(embedder, documents[50:100])])
    assert len(again) == 100
    seed = Seed(documents[60].text, tuple(embedder.key_words(documents[60].text, 5)))
    assert again.search([seed], hits=3)[0][0].document_id == "d060"
    odd = again.search([seed], hits=10, where="source = 'odd'")[0]
    assert len(odd) == 10
    assert all(int(hit.document_id[1:]) % 2 for hit in odd)


def test_an_empty_seed_hits_nothing(database: Database) -> None:
    # Its cosine with every document is 0: all tie, and a tie at the end of the list is left out whole.
    assert database.search([Seed("")], hits=5) == [[]]
