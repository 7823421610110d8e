"""A recipe under torchrun: the first process builds and holds the root, all train, one that fails ends all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from upweight.app.find import find_recipe
from upweight.app.runner import run
from upweight.model.weights import load

RECIPE = Path(__file__).with_name("several_processes.py")


def torchrun(root: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "upweight.cli", "run", str(RECIPE), "--root", str(root), *flags]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280, check=False
    )


def summary(root: Path, step: str) -> dict:
    return json.loads((root / "several" / step / "manifest.json").read_text())["summary"]


@pytest.mark.timeout(600)  # six processes load torch, on a machine that may be busy
def test_a_process_that_fails_ends_all_and_the_next_run_goes_on_sharded(tmp_path: Path) -> None:
    broken = torchrun(tmp_path / "two", FAIL="1")
    said = (broken.stdout + broken.stderr).splitlines()
    assert broken.returncode != 0
    assert [line for line in said if line.startswith("upweight:")] == [
        "upweight: this process does not like the second step"
    ]
    assert sum("[1/2] rows" in line for line in said) == 1
    assert not (tmp_path / "two" / "several" / "fit").exists()

    mended = torchrun(tmp_path / "two", "--sharding", "fsdp")
    assert mended.returncode == 0, mended.stderr
    assert summary(tmp_path / "two", "rows") == {"world": 1, "rank": "0"}  # the first process alone, not trained with
    found = summary(tmp_path / "two", "fit")
    assert found["world"] == 2

    run(find_recipe(str(RECIPE), {}), tmp_path / "one", console=Console(quiet=True))
    alone = summary(tmp_path / "one", "fit")["losses"]
    assert len(alone) == 8  # 16 rows in steps of 4, twice
    assert found["losses"] == pytest.approx(alone[-len(found["losses"]) :], rel=1e-5)
    assert len(found["losses"]) in (6, 7)  # at least the first step was saved before the failure
    ours, theirs = (load(tmp_path / root / "several" / "fit" / "model")[0] for root in ("two", "one"))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
