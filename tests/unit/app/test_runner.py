"""Skip, build, resume, refuse: what the runner does with each state that it may find."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console
from small_stages import Count, Total

from upweight.app.recipe import Recipe, Step
from upweight.app.runner import run, standings
from upweight.app.show import print_intended, print_state
from upweight.core.errors import RootInUse, StaleArtifact, UserError
from upweight.core.files import OUTSIDE
from upweight.core.work import Estimate, Machine, Work
from upweight.store.artifact import LocalStore


def chain(to: int = 3, times: float = 1.0, fail: str = "", seed: int = 0) -> Recipe:
    """numbers -> total -> (nothing else)"""
    numbers = Step("numbers", Count, Count.Config(to=to))
    return Recipe("chain", Step("total", Total, Total.Config(times, fail), {"numbers": numbers}), seed=seed)


def ran(recipe: Recipe, root: Path, **given: object) -> str:
    """What the run printed."""
    console = Console(file=io.StringIO(), width=200)
    run(recipe, root, console=console, machine=Machine(), **given)
    return console.file.getvalue()


def stamp(root: Path, step: str) -> int:
    return (root / "chain" / step / "manifest.json").stat().st_mtime_ns


def test_built_then_skipped(tmp_path: Path) -> None:
    ran(chain(), tmp_path)
    # 0 + 1 + 2 = 3
    assert (tmp_path / "chain" / "total" / "total.txt").read_text() == "3.0\n"
    before = stamp(tmp_path, "numbers"), stamp(tmp_path, "total")
    printed = ran(chain(), tmp_path)
    assert printed.count("complete, skipped") == 2
    assert (stamp(tmp_path, "numbers"), stamp(tmp_path, "total")) == before


def test_the_manifest_tells_everything(tmp_path: Path) -> None:
    ran(chain(), tmp_path)
    manifest = LocalStore(tmp_path, "chain").manifest("total")
    assert manifest["summary"] == {"total": 3}
    assert manifest["identity"]["config"] == {"type": "Config", "times": 1, "fail": ""}
    numbers = LocalStore(tmp_path, "chain").manifest("numbers")
    assert manifest["identity"]["inputs"]["numbers"] == {"step": "numbers", "fingerprint": numbers["fingerprint"]}
    assert numbers["planned"]["tokens"] == 3
    assert numbers["timings"]["attempts"] == 1
    assert numbers["environment"]["versions"]["torch"] != "not installed"
    assert numbers["peak_memory_bytes"] > 1e6
    rows = [json.loads(line) for line in (tmp_path / "chain/numbers/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_changed_field_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    ran(chain(to=3), tmp_path)
    with pytest.raises(StaleArtifact) as caught:
        ran(chain(to=4), tmp_path)
    told = str(caught.value)
    assert "numbers was built from other settings: config.to was 3, now 4" in told
    assert "What depends on it is stale too: total." in told
    assert "--rebuild numbers" in told


def test_rebuild_takes_what_depends_on_it_along(tmp_path: Path) -> None:
    ran(chain(to=3), tmp_path)
    ran(chain(to=4), tmp_path, rebuild=["numbers"])
    # 0 + 1 + 2 + 3 = 6
    assert (tmp_path / "chain" / "total" / "total.txt").read_text() == "6.0\n"


def test_rebuild_without_a_change_rebuilds_below_and_not_above(tmp_path: Path) -> None:
    ran(chain(), tmp_path)
    numbers, total = stamp(tmp_path, "numbers"), stamp(tmp_path, "total")
    ran(chain(), tmp_path, rebuild=["total"])
    assert stamp(tmp_path, "numbers") == numbers
    assert stamp(tmp_path, "total") > total
    total = stamp(tmp_path, "total")
    ran(chain(), tmp_path, rebuild=["numbers"], until="numbers")
    assert stamp(tmp_path, "numbers") > numbers
    assert not (tmp_path / "chain" / "total").exists()


def test_until(tmp_path: Path) -> None:
    ran(chain(), tmp_path, until="numbers")
    assert [item.state for item in standings(chain(), LocalStore(tmp_path, "chain"))] == ["complete", "missing"]
    with pytest.raises(UserError, match="did you mean numbers"):
        ran(chain(), tmp_path, until="number")


def test_another_name_keeps_both(tmp_path: Path) -> None:
    ran(chain(to=3), tmp_path)
    ran(replace(chain(to=4), name="other"), tmp_path)
    assert (tmp_path / "chain/total/total.txt").read_text() == "3.0\n"
    assert (tmp_path / "other/total/total.txt").read_text() == "6.0\n"


@pytest.mark.parametrize("how", ["disk", "archive"])
def test_a_full_disk_is_one_paragraph_and_nothing_half_written(tmp_path: Path, how: str) -> None:
    with pytest.raises(UserError, match="no space left on the disk that holds") as caught:
        ran(chain(fail=how), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chain" / "total").exists()
    assert (tmp_path / "chain" / "numbers" / "manifest.json").exists()


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file system of 200 kB, where the system lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(UserError, match="no space left"):
            ran(chain(to=100_000), small)
        assert not (small / "chain" / "numbers").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_runs_on_one_root(tmp_path: Path) -> None:
    with LocalStore(tmp_path, "other").locked(), pytest.raises(RootInUse):
        ran(chain(), tmp_path)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_stages import Count, Total
from upweight.app.recipe import Recipe, Step
from upweight.app.runner import run
numbers = Step("numbers", Count, Count.Config(to=40, pause_seconds=0.05))
run(Recipe("chain", Step("total", Total, Total.Config(), {"numbers": numbers})), Path(sys.argv[2]))
"""


def test_killed_then_run_again_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    numbers = tmp_path / "chain" / ".building-numbers" / "numbers.txt"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (numbers.exists() and numbers.read_text().count("\n") >= 5):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "chain" / "numbers").exists()
    with (numbers.parent / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut short
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[1/2] numbers: Count (going on)" in again.stdout
    manifest = LocalStore(tmp_path, "chain").manifest("numbers")
    assert manifest["summary"]["resumed_at"] >= 5
    assert manifest["timings"]["attempts"] == 2
    # 0 + ... + 39 = 40 * 39 / 2 = 780
    assert (tmp_path / "chain" / "total" / "total.txt").read_text() == "780.0\n"
    assert all(json.loads(line) for line in (tmp_path / "chain/numbers/metrics.jsonl").read_text().splitlines())


def test_what_was_begun_from_other_settings_is_not_said_to_go_on(tmp_path: Path) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        LocalStore(tmp_path, "chain").create("numbers", chain(to=5).identities()["numbers"]) as begun,
    ):
        (begun / "numbers.txt").write_text("0\n1\n")
        raise KeyboardInterrupt
    assert [item.state for item in standings(chain(to=5), LocalStore(tmp_path, "chain"))] == ["begun", "missing"]
    assert [item.state for item in standings(chain(to=3), LocalStore(tmp_path, "chain"))] == ["missing", "missing"]
    console = Console(file=io.StringIO(), width=200)
    print_intended(chain(to=3), tmp_path, console=console)
    told = "what was begun is removed, config.to was 5, now 3"
    assert f"build     numbers (Count): {told}" in console.file.getvalue()
    printed = ran(chain(to=3), tmp_path)
    assert f"[1/2] numbers: Count (anew: {told})" in printed
    assert "going on" not in printed


def test_an_artifact_that_was_moved_to_another_disk_is_rebuilt(tmp_path: Path) -> None:
    ran(chain(), tmp_path / "runs")
    place = tmp_path / "runs" / "chain" / "numbers"
    moved = place.rename(tmp_path / "moved")
    place.symlink_to(moved)
    assert ran(chain(), tmp_path / "runs").count("skipped") == 2
    ran(chain(), tmp_path / "runs", rebuild=["numbers"])
    assert not place.is_symlink()
    assert (moved / "manifest.json").exists()
    assert ran(chain(), tmp_path / "runs").count("skipped") == 2


def test_what_is_in_the_way_is_said_before_anything_is_built(tmp_path: Path) -> None:
    place = tmp_path / "chain" / "total"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match=r"total exists, but holds no manifest\.json"):
        ran(chain(), tmp_path)
    place.rmdir()
    place.symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(UserError, match="total is a link to what is not there"):
        ran(chain(), tmp_path)
    assert not (tmp_path / "chain" / "numbers").exists()
    assert "total: complete" in ran(chain(), tmp_path, rebuild=["total"])


class Read:
    """Counts the letters of a file outside the run."""

    @dataclass(frozen=True)
    class Config:
        path: str = field(metadata=OUTSIDE)

    @staticmethod
    def run(config: "Read.Config", work: Work) -> dict[str, int]:
        return {"letters": len(Path(config.path).read_text())}

    @staticmethod
    def estimate(config: "Read.Config", inputs: object) -> Estimate:
        return Estimate()


def test_a_file_that_changed_since_it_was_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("five5")
    recipe = Recipe("reading", Step("letters", Read, Read.Config(str(file))))
    told = f"although {file} changed since it was read: --rebuild letters reads it anew"
    ran(recipe, tmp_path / "runs")
    assert ran(recipe, tmp_path / "runs").startswith("[1/1] letters: complete, skipped\n")
    file.write_text("sixsix")
    assert f"[1/1] letters: complete, skipped, {told}\n" in ran(recipe, tmp_path / "runs")
    console = Console(file=io.StringIO(), width=200)
    print_intended(recipe, tmp_path / "runs", console=console)
    assert f"skip      letters (Read), {told}" in console.file.getvalue()
    ran(recipe, tmp_path / "runs", rebuild=["letters"])
    assert LocalStore(tmp_path / "runs", "reading").manifest("letters")["summary"] == {"letters": 6}
    assert "although" not in ran(recipe, tmp_path / "runs")
    file.unlink()  # elsewhere, or on another machine: nothing to compare with
    assert "although" not in ran(recipe, tmp_path / "runs")


def test_what_a_run_would_do(tmp_path: Path) -> None:
    ran(chain(to=3), tmp_path, until="numbers")
    console = Console(file=io.StringIO(), width=200)
    print_intended(chain(to=3), tmp_path, console=console)
    assert console.file.getvalue().split() == ["skip", "numbers", "(Count)", "build", "total", "(Total)"]
    console = Console(file=io.StringIO(), width=200)
    print_intended(chain(to=4), tmp_path, console=console)
    assert "refuse    numbers (Count): config.to was 3, now 4" in console.file.getvalue()


def test_state_and_lineage(tmp_path: Path) -> None:
    ran(chain(), tmp_path)
    model = tmp_path / "chain" / "total" / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    console = Console(file=io.StringIO(), width=200)
    print_state(chain(times=2.0), tmp_path, console=console)
    printed = console.file.getvalue()
    assert "config.times was 1, now 2" in printed
    fingerprint = LocalStore(tmp_path, "chain").manifest("numbers")["fingerprint"]
    assert f"numbers: numbers Count {fingerprint}  count 3" in printed
