"""Parts of stages whose worker is killed the first time that it comes to the second one; worker processes import it."""

import importlib
import os
import signal
from pathlib import Path
from typing import Any

from upweight.store.parts import Tick

KILLED = "killed"


def killed_once(module: str, name: str, item: Any, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """A function of a stage, by its module and name; leaves a file beside the artifact when the worker is killed."""
    mark = out.with_name(f"{out.name}{name}-{KILLED}")
    if place == 1 and not mark.exists():
        done: Any = getattr(importlib.import_module(module), name)(item, place, out, tick)
        assert done  # killed with all its files written, and before it could say so
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    found: dict[str, Any] = getattr(importlib.import_module(module), name)(item, place, out, tick)
    return found
