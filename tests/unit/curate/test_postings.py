from math import log
from pathlib import Path
from random import Random

import numpy as np
import pytest

from upweight.curate import postings
from upweight.curate.postings import Postings


def test_scores_are_those_of_the_equation(tmp_path: Path) -> None:
    index = Postings(tmp_path)
    index.add([["pens", "cost", "pens"], ["a", "pen"], ["cost"]])
    index.flush()
    (pens, cost, nothing, both) = index.search([["pens"], ["cost", "cost"], ["ink"], ["pens", "cost"]])
    # N = 3, lengths 3, 2, 1: mean 2. "pens" is in 1 of 3: idf = ln(1 + 2.5 / 1.5) = 0.980829; twice in document 0:
    # 2 * 2.2 / (2 + 1.2 (0.25 + 0.75 * 3/2)) = 4.4 / 3.65 = 1.205479
    assert pens.rows.tolist() == [0]
    assert pens.scores[0] == pytest.approx(log(1 + 2.5 / 1.5) * 4.4 / 3.65)
    # "cost" is in 2 of 3: idf = ln(1 + 1.5 / 2.5). Once each: 2.2 / (1 + 1.2 (0.25 + 0.75 * 3/2)) = 2.2 / 2.65, with
    # a length of 1 2.2 / (1 + 1.2 (0.25 + 0.75 / 2)) = 2.2 / 1.75
    assert cost.rows.tolist() == [0, 2]
    assert cost.scores == pytest.approx(log(1 + 1.5 / 2.5) * np.array([2.2 / 2.65, 2.2 / 1.75]))
    assert nothing.rows.tolist() == []
    assert both.scores == pytest.approx([pens.scores[0] + cost.scores[0], cost.scores[1]])


def test_segments_and_reopening_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(0)
    documents = [random.choices("abcdefghij", k=random.randint(0, 12)) for _ in range(80)]
    queries = [["a", "c"], ["j"], [], ["b", "x", "i"]]
    whole = Postings(tmp_path / "whole")
    whole.add(documents)
    whole.flush()
    monkeypatch.setattr(postings, "POSTINGS_OF_SEGMENT", 50)
    (tmp_path / "parts" / ".00000").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "parts" / ".00000" / "rows.npy").write_bytes(b"half")
    first = Postings(tmp_path / "parts")
    first.add(documents[:33])
    first.flush()
    again = Postings(tmp_path / "parts")
    assert len(again) == 33
    again.add(documents[33:])
    again.flush()
    assert len(again) == len(whole) == 80
    assert len(list((tmp_path / "parts").iterdir())) > 3
    for a, b in zip(whole.search(queries), Postings(tmp_path / "parts").search(queries), strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert a.scores == pytest.approx(b.scores)
    allowed = np.arange(80) % 2 == 0
    for a, b in zip(whole.search(queries), whole.search(queries, allowed), strict=True):
        assert b.rows.tolist() == [row for row in a.rows.tolist() if row % 2 == 0]
