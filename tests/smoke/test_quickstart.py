"""The whole recipe at a reduced size, as a user starts it: every stage runs, and a second run skips everything."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upweight.recipes import quickstart

SCALE = 0.05


def upweight(*arguments: str, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "upweight.cli", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, env=environment)


@pytest.mark.timeout(900)
def test_quickstart_runs_every_stage_and_then_skips_all(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = ["run", "quickstart", "--scale", str(SCALE), "--root", str(root)]
    first = upweight(*run, timeout_seconds=850)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]

    steps = quickstart.recipe(scale=SCALE).steps()
    for step in steps:
        assert (root / "quickstart" / step.name / "manifest.json").exists(), f"{step.name} has no manifest"

    # every checkpoint of the recipe is in the table, on both families
    table = json.loads((root / "quickstart" / "evaluation" / "table.json").read_text())
    text = json.dumps(table)
    for name in ("base", "cold_start", "sft", "dpd", "rl_stem", "rl_code", "rl_preference", "teacher"):
        assert f'"{name}"' in text
    page = (root / "quickstart" / "report" / "report.html").read_text()
    assert "rl_preference" in page
    assert "http://" not in page.split("<body")[0], "the report asks the network for something"

    started = time.monotonic()
    second = upweight(*run, timeout_seconds=120)
    assert second.returncode == 0, second.stderr[-2000:]
    assert time.monotonic() - started < 60
    # the second run built nothing: no step's manifest is newer than the first run's last one
    assert "complete in" not in second.stdout + second.stderr

    changed = upweight(*run, "--seed", "7", timeout_seconds=120)
    assert changed.returncode == 3, changed.stdout + changed.stderr
    assert "seed" in changed.stderr
