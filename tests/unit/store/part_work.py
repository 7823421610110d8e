"""Functions that worker processes can import."""

import os
import signal
from pathlib import Path
from typing import Any

from upweight.core.errors import UserError
from upweight.store.parts import Tick


def squared(item: int, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Leaves a line each time that it is called."""
    with (out / "calls").open("a") as file:
        file.write(f"{place}\n")
    tick(item)
    return {"square": item * item, "process": os.getpid()}


def killed_once(item: int, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """The worker that comes to item 3 first is killed."""
    if item == 3:
        try:
            (out / "killed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return squared(item, place, out, tick)


def refused(item: int, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """Nothing is right with item 3."""
    if item == 3:
        raise UserError("item 3 is wrong: mend it")
    return squared(item, place, out, tick)


def equipped(item: int, place: int, out: Path, tick: Tick) -> dict[str, Any]:
    """The graphics processors that Ray has given it."""
    import ray

    return {"gpus": ray.get_gpu_ids()}
