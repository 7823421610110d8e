"""Parts of stages whose worker is killed the first time that it comes to the second one; worker processes import it."""

import os
import signal
from pathlib import Path
from typing import Any

from upweight.stages import deduplicate, ingest
from upweight.store.parts import Tick

KILLED = "killed"


def _kill(name: str, place: int, out: Path) -> None:
    """Leaves a file beside the artifact."""
    mark = out.with_name(f"{out.name}-{name}-{KILLED}")
    if place == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def read(item: Any, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    _kill("read", place, out)
    return ingest._read(item, place, out, tick)


def look(item: Any, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    _kill("look", place, out)
    return deduplicate._look(item, place, out, tick)
