"""Stages of curation on a Ray cluster of two workers, one of which is killed in each pass over the documents."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.stages import killed_parts

from upweight.core.work import Machine, Work
from upweight.stages import deduplicate, ingest
from upweight.synthesize.stories import StoryDocuments

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def _line(root: Path, machine: Machine) -> dict[str, bytes]:
    """Raw documents to unique ones; what is on the disk at the end."""
    for name in ("documents", "unique"):
        (root / name).mkdir(parents=True)
    sources = tuple(StoryDocuments(60, seed=seed) for seed in (0, 1, 0))
    ingest.run(ingest.Config(sources), Work(root / "documents", {}, machine))
    deduplicate.run(deduplicate.Config(), Work(root / "unique", {"documents": root / "documents"}, machine))
    files = (file for file in root.rglob("*") if file.is_file() and not file.name.endswith(killed_parts.KILLED))
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(files)}


def test_killed_workers_lose_and_double_nothing(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _line(tmp_path / "here", Machine(workers=1))
    monkeypatch.setattr(ingest, "_read", killed_parts.read)
    monkeypatch.setattr(deduplicate, "_look", killed_parts.look)
    there = _line(tmp_path / "there", Machine(workers=2, cluster="local"))
    marks = sorted(path.name for path in (tmp_path / "there").glob(f"*-{killed_parts.KILLED}"))
    assert marks == ["documents-read-killed", "unique-look-killed"]
    assert here == there
