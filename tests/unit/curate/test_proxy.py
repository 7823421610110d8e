import json
from pathlib import Path

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.curate.proxy import learn
from upweight.curate.scores import NAMES, Scores

STATED = {"coherence": 1.0, "fluency": 1.0}


def _corpus(count: int) -> tuple[list[str], Scores]:
    table = np.random.default_rng(0).integers(0, 10, (count, 20)).astype(np.uint8)
    return [f"d{number}" for number in range(count)], Scores(table)


def _measured(path: Path, ids: list[str], values: np.ndarray) -> Path:
    lines = [json.dumps({"id": name, "value": float(value)}) for name, value in zip(ids, values, strict=True)]
    path.write_text("\n".join([*lines, '{"id": "of another corpus", "value": 3}']))
    return path


def test_many_measurements_replace_what_was_stated(tmp_path: Path) -> None:
    ids, scores = _corpus(4_000)
    shares = scores.table / 9.0
    truth = 3 * shares[:, NAMES.index("safety")] + shares[:, NAMES.index("structure")]
    truth = truth - 2 * shares[:, NAMES.index("fluency")]
    noise = np.random.default_rng(1).normal(size=len(ids))
    found = learn(_measured(tmp_path / "proxy.jsonl", ids, truth + 0.2 * noise), ids, scores, STATED, seed=0)
    # Of weights that sum to 2, as the stated ones do, safety has about 3/4 and structure 1/4; what counts against a
    # document has none.
    assert found.weights["safety"] == pytest.approx(1.5, abs=0.1)
    assert found.weights["structure"] == pytest.approx(0.5, abs=0.1)
    assert "fluency" not in found.weights
    assert sum(found.weights.values()) == pytest.approx(2.0, abs=0.01)
    assert found.figures["measured"] == 4_000
    assert found.figures["spearman_learnt"] > 0.8 > 0.3 > found.figures["spearman_stated"]


def test_few_measurements_move_the_stated_weights_a_little(tmp_path: Path) -> None:
    ids, scores = _corpus(60)
    truth = scores.table[:, [NAMES.index("coherence"), NAMES.index("fluency")]].mean(1)
    found = learn(_measured(tmp_path / "proxy.jsonl", ids, truth), ids, scores, STATED, seed=0)
    assert found.weights["coherence"] + found.weights["fluency"] > 1.6
    assert min(found.weights["coherence"], found.weights["fluency"]) > 0.6


def test_what_no_weights_follow_from_is_refused(tmp_path: Path) -> None:
    ids, scores = _corpus(60)
    with pytest.raises(UserError, match="measures 49 documents"):
        learn(_measured(tmp_path / "few.jsonl", ids[:49], np.arange(49)), ids, scores, STATED, seed=0)
    with pytest.raises(UserError, match="all equal"):
        learn(_measured(tmp_path / "equal.jsonl", ids, np.ones(60)), ids, scores, STATED, seed=0)
    (tmp_path / "bad.jsonl").write_text('{"id": "d1", "value": "high"}\n')
    with pytest.raises(UserError, match="record 1: expected"):
        learn(tmp_path / "bad.jsonl", ids, scores, STATED, seed=0)
