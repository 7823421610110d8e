"""Contract 6: kill -9 at any moment, run again, and the weights are those of the uninterrupted run, bit for bit.

The run crosses a phase boundary and an epoch boundary, accumulates microbatches, and draws random numbers in its loss.
It is killed at some of its events (before and after each flush, rename, removal, save, batch and loss), which
resume_worker.py counts.

Put back on purpose, each fails here: saving without the loader's state (NeMo-RL#3599), without the optimizer or the
random state, writing checkpoints in place, ending at an epoch boundary (verl#5725).
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("resume_worker.py")
EVENTS = 150
"""What an uninterrupted run has."""


def deaths(seed: int) -> list[int]:
    """Six moments of a life to die at; each life is shorter than the one before, by what is saved already."""
    draw = random.Random(seed)
    return [draw.randint(1, EVENTS // 3) for _ in range(6)]


RUNS = {
    "straight": [],
    **{f"killed at random, {seed}": deaths(seed) for seed in range(4)},
    "killed again and again between two saves": list(range(20, 41, 3)),
}


def result(folder: Path, name: str) -> tuple[str, int, list[str]]:
    """The hash of the final weights, the events of the last life, and the steps that all lives reported."""
    weights, events = (folder / name / "weights").read_text().split()
    return weights, int(events), (folder / name / "log").read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, made by one process."""
    made = tmp_path_factory.mktemp("resume")
    plan = [*RUNS.items(), ("straight", [])]
    subprocess.run([sys.executable, str(WORKER), str(made), json.dumps(plan)], check=True, timeout=250)
    return made


def test_the_run_has_what_it_takes(folder: Path) -> None:
    _, _, steps = result(folder, "straight")
    phases = [line.split()[2] for line in steps]
    assert phases == sorted(phases, reverse=True)  # stable, then decay
    assert {"stable", "decay"} == set(phases)
    assert [line.split()[1] for line in steps if line.split()[2] == "stable"][-1] == "700"
    kept = sorted(path.name for path in (folder / "straight" / "checkpoints").iterdir())
    assert kept == ["step-000000008", "step-000000010"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "straight"])
def test_killed_and_run_again(folder: Path, name: str) -> None:
    weights, _, steps = result(folder, "straight")
    resumed, _, reported = result(folder, name)
    assert resumed == weights
    # steps after the last save are made again, and are the same to the last digit
    assert set(reported) == set(steps)
    assert len(reported) > len(steps)


def test_a_finished_run_does_nothing_more(folder: Path) -> None:
    # "straight" was run twice: the second time its weights came from the last checkpoint, and no step was made
    _, events, steps = result(folder, "straight")
    assert len(steps) == len(set(steps)) == 10
    assert events == 0
