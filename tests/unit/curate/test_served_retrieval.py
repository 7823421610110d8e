"""The database that lies elsewhere, as files and behind a server, against the one below a directory."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tests.unit.curate import lance_server

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate import served_retrieval
from upweight.curate.embed import HashedEmbedder
from upweight.curate.retrieval import Database, Embedded, Seed
from upweight.curate.served_retrieval import ServedDatabase

WORDS = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("ale", "ine", "oru", "umi", "eth", "ock", "ärn")]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    random = Random(0)
    texts = [", ".join(random.choices(WORDS, k=random.randint(20, 60))) for _ in range(300)]
    return [Document(f"d{row:03d}", text, "odd" if row % 2 else "even") for row, text in enumerate(texts)]


@pytest.fixture(scope="module")
def embedder(documents: list[Document]) -> HashedEmbedder:
    embedder = HashedEmbedder(64)
    embedder.count(document.text for document in documents)
    return embedder


@pytest.fixture(scope="module")
def seeds(documents: list[Document], embedder: HashedEmbedder) -> list[Seed]:
    texts = [document.text for document in documents[:20]]
    return [Seed(text, tuple(embedder.key_words(text, 5))) for text in texts] + [Seed(text) for text in texts[:3]]


@pytest.fixture(params=["files", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "files":
        yield f"file://{tmp_path}/lance#corpus"
        return
    with lance_server.running(tmp_path) as address:
        monkeypatch.setenv("LANCEDB_API_KEY", lance_server.KEY)
        monkeypatch.setenv("LANCEDB_HOST_OVERRIDE", address)
        yield "db://anything#corpus"


def test_it_finds_what_the_database_below_a_directory_finds(
    documents: list[Document], embedder: HashedEmbedder, seeds: list[Seed], uri: str, tmp_path: Path
) -> None:
    here, served = Database(tmp_path / "here", embedder), ServedDatabase(uri, embedder)
    assert (served.exists, len(served)) == (False, 0)
    for database in (here, served):
        database.add(Embedded.by(embedder, part) for part in (documents[:150], [], documents[150:]))
    assert (served.exists, len(served)) == (True, 300)
    for where in (None, "source = 'odd'"):
        wanted, found = here.search(seeds, hits=10, where=where), served.search(seeds, hits=10, where=where)
        same = [
            [hit.document_id for hit in first] == [hit.document_id for hit in second]
            for first, second in zip(wanted, found, strict=True)
        ]
        assert all(same)
        for first, second in zip(wanted, found, strict=True):
            np.testing.assert_allclose([hit.cosine for hit in first], [hit.cosine for hit in second], atol=1e-5)
            np.testing.assert_allclose([hit.fused for hit in first], [hit.fused for hit in second])


def test_it_can_be_opened_again_added_to_and_dropped(
    documents: list[Document], embedder: HashedEmbedder, seeds: list[Seed], uri: str
) -> None:
    first = ServedDatabase(uri, embedder)
    first.add([Embedded.by(embedder, documents[:10])])
    again = ServedDatabase(uri, embedder)
    again.add([Embedded.by(embedder, documents[10:20])])
    assert len(again) == 20
    assert [hits[0].document_id for hits in again.search(seeds[:20], hits=3)] == [d.id for d in documents[:20]]
    again.drop()
    assert not ServedDatabase(uri, embedder).exists


def test_an_index_of_vectors_finds_nearly_all_of_them(
    documents: list[Document],
    embedder: HashedEmbedder,
    seeds: list[Seed],
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_retrieval, "INDEXED_FROM", len(documents))
    here, served = Database(tmp_path / "here", embedder), ServedDatabase(uri, embedder)
    for database in (here, served):
        database.add([Embedded.by(embedder, documents)])
    wanted, found = here.search(seeds, hits=10), served.search(seeds, hits=10)
    shared = [
        len({hit.document_id for hit in first} & {hit.document_id for hit in second})
        for first, second in zip(wanted, found, strict=True)
    ]
    assert np.mean(shared) >= 9


def test_what_is_in_the_way_is_said(embedder: HashedEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANCEDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="LANCEDB_API_KEY"):
        ServedDatabase("db://corpus", embedder)
    with lance_server.running(tmp_path) as address:
        monkeypatch.setenv("LANCEDB_API_KEY", "another")
        monkeypatch.setenv("LANCEDB_HOST_OVERRIDE", address)
        with pytest.raises(UserError, match="does not answer as it should"):
            ServedDatabase("db://corpus", embedder)
