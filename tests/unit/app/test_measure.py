"""eval: samples are kept and read again while weights, problems and decoding are the same, and made anew otherwise."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_checkpoint import tiny_checkpoint

from upweight.app.measure import measure_models
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.work import Machine


def measured(folder: Path, models: list[str], seed: int = 0) -> tuple[dict[str, object], str]:
    console = Console(file=io.StringIO(), width=120)
    table = measure_models(
        models,
        [folder / "own.jsonl"],
        root=folder / "runs",
        out=folder / "evals",
        samples=2,
        count=0,
        limits=Limits(max_new_tokens=5, seed=seed),
        machine=Machine(),
        console=console,
    )
    return table, console.file.getvalue()


def test_two_models_side_by_side_and_again(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n{"question": "1?", "answer": "1"}\n')
    models = [str(tiny_checkpoint(tmp_path / name, seed)) for seed, name in enumerate(["a", "b"])]
    table, printed = measured(tmp_path, models)
    assert [row["checkpoint"] for row in table["rows"]] == models
    assert "within the noise" in printed
    assert json.loads((tmp_path / "evals" / "table.json").read_text()) == table
    again, printed = measured(tmp_path, models)
    assert again == table
    assert "samples/s" not in printed  # nothing was sampled
    assert "samples/s" in measured(tmp_path, models, seed=1)[1]


def test_what_is_missing_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    model = str(tiny_checkpoint(tmp_path / "a"))
    with pytest.raises(UserError, match="does not exist"):
        measured(tmp_path, [model])
    with pytest.raises(UserError, match="at least one model"):
        measured(tmp_path, [])
    with pytest.raises(UserError, match="is no model directory"):
        measured(tmp_path, ["elsewhere"])
