"""Contract 1 for reinforcement: groups that several processes sample and judge train as those of one process do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective_cases import difference
from reinforce_worker import CONFIG, LAYOUTS

from upweight.core.records import Rollout
from upweight.model.weights import load
from upweight.store.jsonl import read_jsonl

WORKER = Path(__file__).with_name("reinforce_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reinforce")
    subprocess.run([sys.executable, str(WORKER), str(made)], check=True, timeout=280)
    return made


def sampled(folder: Path, name: str, step: int) -> list[list[tuple[int, ...]]]:
    rollouts = read_jsonl(folder / name / "rollouts" / f"step-{step:05d}.jsonl", Rollout)
    return [[completion.tokens for completion in rollout.completions] for rollout in rollouts]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_the_number_of_processes_does_not_matter(folder: Path, name: str) -> None:
    model, _ = load(folder / name / "model")
    alone, _ = load(folder / "one" / "model")
    before, _ = load(folder / "base" / "model")
    assert difference(before.state_dict(), alone.state_dict()) > 1e-3
    assert difference(model.state_dict(), alone.state_dict()) < 1e-5
    for step in range(1, CONFIG.steps + 1):
        assert sampled(folder, name, step) == sampled(folder, "one", step)
        assert len(sampled(folder, name, step)) == CONFIG.problems_a_step
    told, expected = (json.loads((folder / which / "told.json").read_text()) for which in (name, "one"))
    for row, other in zip(told["rows"], expected["rows"], strict=True):
        for metric in ("reward", "truncated_share", "mean_length", "loss", "gradient_norm"):
            if metric in other:
                assert row[metric] == pytest.approx(other[metric], rel=1e-4), metric
    # only the first process writes
    assert not (folder / f"{name}1" / "model" / "config.json").exists()
    assert not (folder / f"{name}1" / "rollouts").exists()


def test_the_weights_are_used_as_they_become(folder: Path) -> None:
    # were the groups of a sharded policy sampled from the weights it began with, step 3 would be refused or differ
    assert all(torch.isfinite(value).all() for value in load(folder / "fsdp" / "model")[0].state_dict().values())
    told = json.loads((folder / "fsdp" / "told.json").read_text())
    assert told["summary"]["largest_logprob_difference"] < 1e-4
