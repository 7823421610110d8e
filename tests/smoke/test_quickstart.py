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


@pytest.mark.timeout(900)
def test_a_claim_is_put_to_the_test_on_what_the_quickstart_has_built(quickstart_folder: Path) -> None:
    shared = quickstart_folder / "claims" / "seed0"
    shared.parent.mkdir()
    shared.symlink_to(quickstart_folder / "runs")
    options = ("--seeds", "1", "--scale", str(SCALE), "--root", "claims", "--write", "evidence.md")
    done = upweight("ablate", "sft_size", *options, timeout_seconds=400, folder=quickstart_folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "base: complete, skipped" in done.stdout
    result = json.loads((quickstart_folder / "claims" / "sft_size.json").read_text())
    assert len(result["arms"]) == 6  # three sizes on two kinds of problems
    assert "one seed: none" in (quickstart_folder / "evidence.md").read_text()
