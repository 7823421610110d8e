"""Metrics for other eyes: what goes to metrics.jsonl goes to TensorBoard, trackio or Weights & Biases too, when asked.

    tensorboard     event files in STEP/tensorboard: tensorboard --logdir runs
    trackio         the local database of trackio: trackio show
    wandb           as the client is set up (WANDB_API_KEY, WANDB_MODE)
    wandb-offline   below STEP/wandb, to be sent later: wandb sync

Each is an optional package; pip install 'upweight[track]' brings all. A run without its tracker would be a run that
nobody watches, so a missing package is an error before anything is built.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from upweight.core.errors import UserError

Kind = Literal["tensorboard", "trackio", "wandb", "wandb-offline"]
PACKAGES: Mapping[str, str] = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "wandb-offline": "wandb",
}
COUNTERS = ("step", "rollout_step")


def check_trackers(kinds: Sequence[str]) -> None:
    """Raises UserError where a kind is unknown or its package is not there."""
    for kind in kinds:
        if kind not in PACKAGES:
            raise UserError(f"there is no tracker {kind!r}: known are {', '.join(PACKAGES)}")
        _module(kind)


class Trackers:
    """The trackers of one step. Each is opened with the first row: a step that records nothing leaves no empty run."""

    def __init__(self, kinds: Sequence[str], *, recipe: str, step: str, out: Path) -> None:
        self._kinds, self._recipe, self._step, self._out = kinds, recipe, step, out
        self._open: dict[str, Any] = {}
        self._rows = 0

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl: its finite numbers and its texts, at the step that it names."""
        self._rows += 1
        counter = next((name for name in COUNTERS if name in row), None)
        step = int(row[counter]) if counter else self._rows
        kept = {name: value for name, value in row.items() if name != counter and _is_shown(value)}
        for kind in self._kinds:
            self._log(kind, kept, step)

    def close(self) -> None:
        """Write out what is pending."""
        for kind, opened in self._open.items():
            if kind == "tensorboard":
                opened.close()
            elif kind == "trackio":
                _module(kind).finish()
            else:
                opened.finish()
        self._open.clear()

    def _log(self, kind: str, row: Mapping[str, Any], step: int) -> None:
        if kind not in self._open:
            self._open[kind] = self._opened(kind)
        opened = self._open[kind]
        if kind == "tensorboard":
            for name, value in row.items():
                if not isinstance(value, str):
                    opened.add_scalar(name, value, step)
        elif kind == "trackio":
            _module(kind).log(dict(row), step=step)
        else:
            opened.log(dict(row), step=step)

    def _opened(self, kind: str) -> Any:
        module, project = _module(kind), f"upweight-{self._recipe}"
        if kind == "tensorboard":
            return module.SummaryWriter(str(self._out / "tensorboard"))
        if kind == "trackio":
            return module.init(project=project, name=self._step, resume="allow", embed=False)
        mode = "offline" if kind == "wandb-offline" else None
        return module.init(project=project, name=self._step, dir=str(self._out), mode=mode, reinit="finish_previous")


def _module(kind: str) -> Any:
    try:
        module = importlib.import_module(PACKAGES[kind])
        if not (hasattr(module, "init") or hasattr(module, "SummaryWriter")):
            raise ImportError(f"{module} is a directory of that name")  # ./wandb, which its client leaves
        return module
    except ImportError as error:
        package = kind.partition("-")[0]
        raise UserError(
            f"the tracker {kind} needs the package {package}, which is not installed ({error}): pip install {package}, "
            "or pip install 'upweight[track]' for all of them; metrics.jsonl is written without any"
        ) from None


def _is_shown(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value))
