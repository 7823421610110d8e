from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.work import Estimate, Work
from upweight.curate.scores import Scores
from upweight.curate.tagger import Tagger
from upweight.stages import tag

TEXTS = [
    f"Sentence number {number} explains why water boils at lower temperatures up on mountains." for number in range(30)
]


def write(directory: Path, texts: list[str]) -> Path:
    (directory / "documents").mkdir(parents=True)
    for part in range(2):
        rows = [{"id": f"{number:03}", "text": text, "source": "ab"[number % 2]} for number, text in enumerate(texts)]
        schema = arrow.schema([(name, arrow.string()) for name in ("id", "text", "source")])
        parquet.write_table(arrow.Table.from_pylist(rows[part::2], schema), directory / "documents" / f"{part}.parquet")
    return directory


def test_every_document_is_scored_in_its_place(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", {"documents": write(tmp_path / "in", TEXTS)})
    work.out.mkdir()
    (work.out / ".tags.parquet.building").write_text("left by a killed run")
    summary = tag.run(tag.Config(), work)
    ids = [f"{number:03}" for number in range(30)]
    scores = Scores.read(work.out / "tags.parquet", ids)
    assert scores.table.tolist() == Tagger.load().score(TEXTS).tolist()
    assert summary["documents"] == 30
    assert sum(summary["histograms"]["safety"]) == 30
    assert set(summary["mean_scores_by_source"]) == {"a", "b"}
    assert summary["tagger"]["spearman"] >= 0.76
    assert len(summary["examples"]["highest"]) == 2
    assert [path.name for path in work.out.iterdir()] == ["tags.parquet"]
    written = (work.out / "tags.parquet").read_bytes()
    tag.run(tag.Config(), work)
    assert (work.out / "tags.parquet").read_bytes() == written


def test_no_documents_and_no_tagger(tmp_path: Path) -> None:
    work = Work(tmp_path, {"documents": write(tmp_path / "in", [])})
    with pytest.raises(UserError, match="holds no document"):
        tag.run(tag.Config(), work)
    with pytest.raises(UserError, match="does not exist"):
        tag.run(tag.Config("missing.npz"), work)


def test_estimate_grows_with_the_input() -> None:
    small, large = (tag.estimate(tag.Config(), {"documents": Estimate(disk_bytes=size)}) for size in (1e6, 1e8))
    assert 0 < small.seconds < large.seconds
