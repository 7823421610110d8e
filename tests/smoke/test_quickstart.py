"""The whole recipe at a reduced size, as a user starts it: every stage runs, and a second run skips everything."""

import json
import time
from pathlib import Path

import pytest
from command import SCALE, upweight

from upweight.recipes import quickstart

RUN = ("run", "quickstart", "--scale", str(SCALE))


@pytest.mark.timeout(900)
def test_every_stage_leaves_its_artifact_and_every_checkpoint_is_measured(quickstart_folder: Path) -> None:
    built = quickstart_folder / "runs" / "quickstart"
    for step in quickstart.recipe(scale=SCALE).steps():
        assert (built / step.name / "manifest.json").exists(), f"{step.name} has no manifest"
    rows = json.loads((built / "evaluation" / "table.json").read_text())["rows"]
    checkpoints = ("base", "cold_start", "sft", "dpd", "rl_stem", "rl_code", "rl_preference", "teacher")
    assert [(row["checkpoint"], row["family"]) for row in rows] == [
        (name, family) for name in checkpoints for family in ("stem", "code")
    ]
    page = (built / "report" / "report.html").read_text()
    assert "rl_preference" in page
    assert "http://" not in page.split("<body")[0], "the report asks the network for something"


@pytest.mark.timeout(900)
def test_a_second_run_skips_everything_and_another_seed_is_refused(quickstart_folder: Path) -> None:
    started = time.monotonic()
    second = upweight(*RUN, timeout_seconds=120, folder=quickstart_folder)
    assert second.returncode == 0, second.stderr[-2000:]
    assert time.monotonic() - started < 60
    assert "complete in" not in second.stdout + second.stderr  # it built nothing

    changed = upweight(*RUN, "--seed", "7", timeout_seconds=120, folder=quickstart_folder)
    assert changed.returncode == 3, changed.stdout + changed.stderr
    assert "seed" in changed.stderr
