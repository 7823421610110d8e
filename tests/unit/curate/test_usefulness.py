"""Labels against usefulness: areas by hand, and a comparison of labels as a claim."""

import io
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from rich.console import Console

from upweight.app.ablate import ablate
from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.usefulness import Labels, outranked, ranked, read_judged


def annotated(path: Path, count: int = 120) -> str:
    """Documents of which the scores of content tell the useful ones with little noise, those of format nothing."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        useful = number % 3 > 0
        content = np.clip(random.normal(5 + useful, 1.0, len(DIMENSIONS)), 0, 9)
        form = random.uniform(0, 9, len(DIMENSIONS))
        scores = [
            round(float(content[at] if dimension.kind == "content" else form[at]))
            for at, dimension in enumerate(DIMENSIONS)
        ]
        rows.append({"id": f"d{number}", "source": "wikipedia" if useful else "spam", "scores": scores})
        rows[-1]["source"] = f"word-problems-{'clean' if useful else 'typo'}" if number % 2 else rows[-1]["source"]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_shares_of_outranked_documents_by_hand() -> None:
    values, useful = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([True, True, False, True, False])
    # useless: 2 and 0. Above 3 lie none: 2/2; 1 beats 0: 1/2; 2 ties with 2 and beats 0: 1.5/2
    assert outranked(values, useful).tolist() == [1.0, 0.5, 0.75]


def test_labels_choose_columns_and_cut_them() -> None:
    scores = np.tile(np.array([[4.0], [5.0], [9.0]]), len(DIMENSIONS))
    assert Labels("content").of(scores).shape[1] + Labels("format").of(scores).shape[1] == len(DIMENSIONS)
    assert Labels(binary="half").of(scores)[:, 0].tolist() == [0, 1, 1]
    assert Labels(binary="median").of(scores)[:, 0].tolist() == [0, 0, 1]


def test_no_document_is_ranked_by_a_regression_that_has_seen_it() -> None:
    random = np.random.default_rng(0)
    noise, useful = random.normal(size=(60, 20)), random.random(60) < 0.5
    # twenty columns of noise fit sixty labels well; what was held out is ranked as by chance
    assert outranked(ranked(noise, useful), useful).mean() < 0.65
    assert outranked(ranked(noise + 2 * useful[:, None], useful), useful).mean() > 0.95


def test_labels_are_compared_as_a_claim(tmp_path: Path) -> None:
    path = annotated(tmp_path / "annotated.jsonl")
    console = Console(file=io.StringIO(), width=120)
    given = {"scale": None, "root": tmp_path / "runs", "machine": Machine(), "console": console}
    page = tmp_path / "evidence.md"
    result = ablate("label_kind", seeds=[0, 1], annotated=path, write=page, **given)
    rows = {(row["arm"], row["family"]): row for row in result["arms"]}
    assert rows["content", "all"]["mean"] > 0.9 > 0.7 > rows["format", "all"]["mean"]
    samples = tmp_path / "runs" / "seed1" / "label_kind" / "claim_label_kind" / "samples" / "content.all.jsonl"
    scores = [json.loads(line)["score"] for line in samples.read_text().splitlines()]
    assert rows["content", "all"]["by_seed"][1]["mean"] == pytest.approx(fmean(scores), abs=1e-6)
    assert "with documents as the units" in page.read_text()
    assert "--annotated annotated.jsonl" in page.read_text()
    with pytest.raises(UserError, match=r"--annotated FILE.*upweight annotate"):
        ablate("label_scale", seeds=[0], **given)
    with pytest.raises(UserError, match="does not take --annotated"):
        ablate("dpd_parts", seeds=[0], annotated=path, **given)


def test_documents_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "annotated.jsonl"
    path.write_text(json.dumps({"id": "a", "source": "web", "scores": [5] * len(DIMENSIONS)}))
    with pytest.raises(UserError, match=r"0 documents of useful sources and 0 of useless.*Its sources are web"):
        read_judged(path)
    path.write_text(json.dumps({"id": "a", "source": "spam", "scores": [5, 12]}))
    with pytest.raises(UserError, match="record 1: scores are"):
        read_judged(path)
