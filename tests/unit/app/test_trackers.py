"""Trackers: what each is given, and that one which is not there is an error before anything is built."""

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from upweight.app.recipe import Recipe, Step
from upweight.app.runner import run
from upweight.app.trackers import PACKAGES, Trackers, check_trackers
from upweight.core.errors import UserError
from upweight.core.work import Estimate

QUIET = Console(file=io.StringIO())


class Learn:
    """A stage that records two steps, with a value that is no number."""

    @dataclass(frozen=True)
    class Config:
        pass

    @staticmethod
    def run(config: Any, work: Any) -> dict[str, Any]:
        work.monitor.record(step=1, loss=2.0, phase="warmup", grade=math.nan)
        work.monitor.record(step=2, loss=1.5, phase="stable")
        return {}

    @staticmethod
    def estimate(config: Any, inputs: Any) -> Estimate:
        return Estimate()


class Silent(Learn):
    """A stage that records nothing."""

    @staticmethod
    def run(config: Any, work: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for the three libraries, which write down what they are asked."""
    found: list[Any] = []

    class Writer:
        def __init__(self, directory: str) -> None:
            found.append(("open tensorboard", Path(directory).name))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            found.append((name, value, step))

        def close(self) -> None:
            found.append("close tensorboard")

    def logged(row: dict[str, Any], step: int) -> None:
        found.append((row, step))

    def init(**settings: Any) -> Any:
        found.append({name: value for name, value in settings.items() if name in ("project", "name", "mode")})
        return SimpleNamespace(log=logged, finish=lambda: found.append("finish"))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    trackio = SimpleNamespace(init=init, log=logged, finish=lambda: found.append("finish"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    return found


def recipe() -> Recipe:
    return Recipe("r", Step("learn", Learn, Learn.Config(), {"before": Step("before", Silent, Silent.Config())}))


def test_tensorboard(told: list[Any], tmp_path: Path) -> None:
    run(recipe(), tmp_path, console=QUIET, track=["tensorboard"])
    # one run for the step that records, none for the other; texts and what is not finite are left out
    expected = [("open tensorboard", "tensorboard"), ("loss", 2.0, 1), ("loss", 1.5, 2), "close tensorboard"]
    assert told == expected
    rows = [json.loads(line) for line in (tmp_path / "r/learn/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [2.0, 1.5]  # written whoever else is told


@pytest.mark.parametrize(
    ("kind", "mode"), [("wandb", {"mode": None}), ("wandb-offline", {"mode": "offline"}), ("trackio", {})]
)
def test_run_databases(told: list[Any], tmp_path: Path, kind: str, mode: dict[str, Any]) -> None:
    run(recipe(), tmp_path, console=QUIET, track=[kind])
    assert told == [
        {"project": "upweight-r", "name": "learn", **mode},
        ({"loss": 2.0, "phase": "warmup"}, 1),
        ({"loss": 1.5, "phase": "stable"}, 2),
        "finish",
    ]


def test_rows_without_a_step_are_counted(told: list[Any], tmp_path: Path) -> None:
    trackers = Trackers(["trackio"], recipe="r", step="s", out=tmp_path)
    for row in ({"loss": 1.0}, {"rollout_step": 7, "reward": 0.5}, {"loss": 0.5}):
        trackers.log(row)
    trackers.close()
    assert told[1:4] == [({"loss": 1.0}, 1), ({"reward": 0.5}, 7), ({"loss": 0.5}, 3)]


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_stops_the_run_before_it_begins(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(UserError, match=rf"pip install {kind.partition('-')[0]}, or pip install 'upweight\[track\]'"):
        run(recipe(), tmp_path / "runs", console=QUIET, track=[kind])
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match="no tracker 'mlflow': known are tensorboard"):
        check_trackers(["mlflow"])
