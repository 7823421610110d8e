"""Work that falls into parts: side by side in processes of this machine or on a Ray cluster, each part done once.

What a part came to is kept beside the artifact as soon as it is complete, so a run that was killed goes on with the
parts that are left, and a worker that dies costs its part's time and nothing else. Results come in the order of the
parts whatever the number of workers: an artifact does not depend on where it was made.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import pickle
import pickletools
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context, parent_process, set_forkserver_preload
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from upweight.core.errors import UserError
from upweight.core.work import Bar, Machine, Work
from upweight.store.artifact import write_whole

Item = TypeVar("Item")
Tick = Callable[[float | int], None]
"""Called with the units that were done since it was called last."""
Do = Callable[[Item, int, Path, Tick], dict[str, Any]]
"""Does one part: the item, its place among all, the artifact's directory, and whom to tell; returns JSON data."""

DIRECTORY, LEFT = ".parts", ".parts-left"
WORTH_PROCESSES = 2_000
"""Documents from which on several processes are faster than one."""
DEATHS = 3
"""How often workers may die before the run stops."""
POLL_SECONDS = 0.5
WAITING = 4
"""Parts that a cluster is given at once, for each of its processors: it sees what is to do, and can grow."""
SEEN_SECONDS = 120.0
"""How long a file of another node may take to be seen here."""


def in_parts(
    do: Do[Item],
    items: Sequence[Item],
    work: Work,
    bar: Bar,
    name: str = "read",
    *,
    units: float | int = math.inf,
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """What `do` returns for each item, in order.

    Args:
        do: a function of a module; it may be called again for a part that was not completed, so it overwrites.
        items: the parts, equal in every run of the step.
        work: `machine.workers` processes do the parts, or Ray where `machine.cluster` names one.
        bar: told what `do` tells its Tick.
        name: of this pass over the parts, where a step has several.
        units: of work in all; for few it is not worth while to start processes.
        device: the torch device that a part computes on: on a Ray cluster each part that does has a GPU of its own.

    Call `forget` when the artifact is complete.
    """
    shutil.rmtree(work.out / LEFT, ignore_errors=True)
    kept = work.out / DIRECTORY / name
    kept.mkdir(parents=True, exist_ok=True)
    for left in kept.glob("*.count"):
        left.unlink()
    open_parts = [place for place, item in enumerate(items) if _result(kept, place, item) is None]
    for place in set(range(len(items))) - set(open_parts):
        bar.advance(_result_of(kept, place)["units"])
    workers = work.machine.workers if units >= WORTH_PROCESSES else 1
    machine = replace(work.machine, workers=workers, device=device)
    done = _done(do, items, open_parts, replace(work, machine=machine), bar, kept)
    waiting = set(open_parts)
    for place in range(len(items)):
        while place in waiting:
            waiting.discard(next(done))
        result: dict[str, Any] = _result_of(kept, place)["result"]
        yield result
    done.close()


def one_of_several() -> bool:
    """Whether this process does parts beside others of its machine, and so should not take more than one thread."""
    return _elsewhere


def forget(out: Path) -> None:
    """Remove what was kept of the parts, all at once: half of it would be taken for parts that are done."""
    if (out / DIRECTORY).exists():
        (out / DIRECTORY).rename(out / LEFT)
    shutil.rmtree(out / LEFT, ignore_errors=True)


def _done(
    do: Do[Item], items: Sequence[Item], places: Sequence[int], work: Work, bar: Bar, kept: Path
) -> Generator[int, None, None]:
    """Do the parts, and say which is complete as they are."""
    tasks = [(do, items[place], place, work.out.resolve(), kept.resolve()) for place in places]
    if work.machine.cluster:
        yield from _on_ray(tasks, work, bar, kept)
    elif min(len(tasks), work.machine.workers) > 1 and all(map(_travels, tasks)):
        yield from _in_processes(tasks, work, bar, kept)
    else:
        for task in tasks:
            _complete(*task, tick=bar.advance)
            yield task[2]


_Task = tuple[Any, Any, int, Path, Path]
_elsewhere = False


def _complete(do: Any, item: Any, place: int, out: Path, kept: Path, *, tick: Tick) -> None:
    """Do a part and keep its result."""
    units = 0.0

    def counted(more: float | int) -> None:
        nonlocal units
        units += more
        tick(more)

    result = do(item, place, out, counted)
    text = json.dumps({"of": _name(item), "units": units, "result": result})
    write_whole(kept / f"{place:05d}.json", text)


def _complete_elsewhere(do: Any, item: Any, place: int, out: Path, kept: Path) -> int:
    """The same in another process, which says how far it is in a file."""
    global _elsewhere
    _elsewhere = True
    count = kept / f"{place:05d}.count"
    total, said = 0.0, time.monotonic()

    def tick(more: float | int) -> None:
        nonlocal total, said
        total += more
        if time.monotonic() - said > POLL_SECONDS:
            write_whole(count, f"{total:.0f}")
            said = time.monotonic()

    _complete(do, item, place, out, kept, tick=tick)
    return place


class _Progress:
    """Tells the bar of parts that are done elsewhere."""

    def __init__(self, kept: Path, bar: Bar) -> None:
        self._kept, self._bar = kept, bar
        self._told: dict[int, float] = {}

    def look(self, places: Sequence[int]) -> None:
        for place in places:
            try:
                self._tell(place, float((self._kept / f"{place:05d}.count").read_text()))
            except (OSError, ValueError):
                continue

    def complete(self, place: int) -> None:
        self._tell(place, float(_result_of(self._kept, place)["units"]))
        (self._kept / f"{place:05d}.count").unlink(missing_ok=True)

    def _tell(self, place: int, units: float) -> None:
        told = self._told.get(place, 0.0)
        if units > told:
            self._told[place] = units
            self._bar.advance(units - told)


def _in_processes(tasks: list[_Task], work: Work, bar: Bar, kept: Path) -> Iterator[int]:
    progress = _Progress(kept, bar)
    left = {task[2]: task for task in tasks}
    set_forkserver_preload([tasks[0][0].__module__])  # imported once, and not by each worker
    for death in range(DEATHS):
        pool = ProcessPoolExecutor(work.machine.workers, get_context("forkserver"), initializer=_begin)
        try:
            running: dict[Future[int], int] = {
                pool.submit(_complete_elsewhere, *task): place for place, task in left.items()
            }
            while running:
                ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    place = future.result()
                    running.pop(future)
                    left.pop(place)
                    progress.complete(place)
                    yield place
                progress.look(list(left)[: 2 * work.machine.workers])
            return
        except BrokenProcessPool:
            if death + 1 == DEATHS:
                raise UserError(
                    f"workers died {DEATHS} times, the last time with {len(left)} parts left: is there enough memory? "
                    "Take fewer with --workers; what is complete is kept"
                ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """A worker ends without a word when it is interrupted, and when its parent ends, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _on_ray(tasks: list[_Task], work: Work, bar: Bar, kept: Path) -> Iterator[int]:
    """On the cluster, whose nodes see the artifact's directory by the same path. Parts of dead workers are repeated."""
    try:
        # an optional extra
        import ray
    except ImportError:
        raise UserError("working on a Ray cluster needs the extra: pip install 'upweight[ray]'") from None
    progress = _Progress(kept, bar)
    started = not ray.is_initialized()
    if started:
        ray.init(**_address(work.machine), log_to_driver=False, logging_level=logging.ERROR)
    running: dict[Any, int] = {}
    try:
        gpus = 1 if work.machine.device.startswith("cuda") else 0
        remote = ray.remote(max_retries=DEATHS, num_cpus=1, num_gpus=gpus)(_complete_on_node)
        left = iter(tasks)
        while True:
            most = WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)))
            for do, item, place, out, beside in islice(left, max(0, most - len(running))):
                packed: bytes = ray.cloudpickle.dumps((do, item))
                running[remote.remote(Path.cwd(), sys.path, packed, place, out, beside)] = place
            if not running:
                return
            ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in ended:
                place = running.pop(reference)
                ray.get(reference)
                _await_seen(kept / f"{place:05d}.json")
                progress.complete(place)
                yield place
            progress.look(list(running.values()))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"the Ray cluster has given a part up after {DEATHS} repeats ({error}); what is complete is kept"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _complete_on_node(directory: Path, search_path: list[str], packed: bytes, place: int, out: Path, kept: Path) -> int:
    """With the directory and the search path of the run: what it names and imports is the same there."""
    if directory.is_dir():
        os.chdir(directory)
    sys.path += [entry for entry in search_path if entry not in sys.path]
    do, item = pickle.loads(packed)
    return _complete_elsewhere(do, item, place, out, kept)


def _await_seen(path: Path) -> None:
    """Wait for a file that another node has written: a network file system may show it late."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"a worker of the Ray cluster has completed a part, but {path} is not to be seen here: all nodes need "
                "the root by the same path, so give one with --root on a disk that they share"
            )
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # some file systems look anew only then


def _address(machine: Machine) -> dict[str, Any]:
    """ "local" starts a cluster of this machine's workers for the time of the step."""
    return {"num_cpus": machine.workers} if machine.cluster == "local" else {"address": machine.cluster}


def _result(kept: Path, place: int, item: object) -> dict[str, Any] | None:
    """What is kept of a part, if it is of this item."""
    try:
        found = _result_of(kept, place)
    except (OSError, ValueError):
        return None
    return found if found.get("of") == _name(item) else None


def _result_of(kept: Path, place: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kept / f"{place:05d}.json").read_text())
    return found


def _name(item: object) -> str:
    return hashlib.sha256(repr(item).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _travels(task: _Task) -> bool:
    """Whether another process can load it: not what a recipe's own file defines, which has no importable name."""
    try:
        packed = pickle.dumps(task[:2], protocol=2)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    named = {str(value).split(" ")[0] for code, value, _ in pickletools.genops(packed) if code.name == "GLOBAL"}
    return all(_importable(module) for module in named)


def _importable(module: str) -> bool:
    top = module.partition(".")[0]  # looked for anew: a recipe's file is among the modules, and found by no path
    return top != "__main__" and any(finder.find_spec(top, None) is not None for finder in sys.meta_path)
