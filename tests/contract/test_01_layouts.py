"""Contract 1 in several processes: rows, time and matrices may be shared out over them in any way.

Put back on purpose, each of these fails here: a loss that counts once for each process of a group, gradients of a
whole weight that add up over a tensor group, norms of heads whose gradients do not, keys of another process left out.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_worker import LAYOUTS, chosen
from objective_cases import difference, one_step

WORKER = Path(__file__).with_name("layout_worker.py")
TOLERANCE = 5e-5
"""fp32: weights move by up to 1, sums are over some hundred terms."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes of all layouts ended with."""
    made = tmp_path_factory.mktemp("layouts")
    subprocess.run([sys.executable, str(WORKER), str(made)], check=True, timeout=280)
    return made


@pytest.mark.parametrize("name", chosen())
def test_the_layout_does_not_matter(folder: Path, name: str) -> None:
    case, kind = chosen()[name]
    report, expected = one_step(case, [case.make(case.items, 256)], kind=kind)
    assert difference(case.policy().state_dict(), expected) > 1e-3  # the step did something
    for layout, (size, _) in LAYOUTS.items():
        for rank in range(size):
            loss, weight, norm, weights = torch.load(folder / f"{layout} {rank}.pt")[name]
            assert difference(weights, expected) < TOLERANCE, (layout, rank)
            assert loss == pytest.approx(report.loss, rel=1e-5), (layout, rank)
            assert weight == report.weight, (layout, rank)
            assert norm == pytest.approx(report.gradient_norm, rel=1e-4), (layout, rank)
