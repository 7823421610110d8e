"""Contract 6 for sharded runs: what kill -9 leaves goes on bit for bit, and in any other layout up to rounding.

Put back on purpose, each fails here: checkpoints written in place, or complete before all processes have written; parts
that are read as if they were whole; an optimizer state that is kept by number, which another layout counts otherwise.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective_cases import difference
from resume_worker import run
from sharded_worker import BACK, OTHERWISE, STOPPED_AT

from upweight.core.errors import UserError
from upweight.objectives.next_token import NextToken

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, made by one process."""
    made = tmp_path_factory.mktemp("sharded")
    subprocess.run([sys.executable, str(WORKER), str(made)], check=True, timeout=280)
    return made


def told(folder: Path, name: str, rank: int) -> list[str]:
    """The hash of the final weights, and the events of the last life."""
    return (folder / name / f"weights{rank}").read_text().split()


def test_killed_and_run_again(folder: Path) -> None:
    for rank in range(2):
        straight, killed = (told(folder, name, rank) for name in ("straight", "killed"))
        assert killed[0] == straight[0]
        assert int(killed[1]) < int(straight[1])  # the last life went on from what others had saved
        steps, reported = ((folder / name / f"log{rank}").read_text().splitlines() for name in ("straight", "killed"))
        assert set(reported) == set(steps)
        assert len(reported) > len(steps) == 10
    kept = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
    assert kept == ["step-000000008", "step-000000010"]
    parts = sorted(path.name for path in (folder / "killed" / "checkpoints" / kept[-1] / "parts").iterdir())
    assert parts == [".metadata", "__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize("name", [*OTHERWISE, *(f"{name}, back" for name in BACK)])
def test_another_layout_takes_it_up(folder: Path, name: str) -> None:
    expected = torch.load(folder / "whole" / "weights0.pt")
    log = (folder / name / "log0").read_text().splitlines()
    # steps 1 to 7 of the run that was stopped, then those after the last checkpoint, of step 6 or 4
    first = next(int(line.split()[0]) for line in log[STOPPED_AT:])
    assert first in (5, 7)
    size = OTHERWISE[name][0] if name in OTHERWISE else 1
    for rank in range(size):
        assert difference(torch.load(folder / name / f"weights{rank}.pt"), expected) < 2e-5


def test_damaged_parts_are_named(folder: Path) -> None:
    newest = sorted((folder / "stopped" / "checkpoints").glob("step-*"))[-1]
    part = newest / "parts" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{re.escape(str(newest))} cannot be read .* remove it"):
        run(folder, folder / "stopped" / "checkpoints", folder / "log", objective=NextToken())
