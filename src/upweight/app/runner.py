"""The runner: for each step, in order, skip it, build it, resume it, or refuse.

Everything that can be refused is refused before anything is built: a stale artifact at the end of a recipe is found
before hours are spent on its beginning.

`rebuild` removes the named step's artifact and every artifact that depends on it, even where no field differs: whoever
rebuilds distrusts what is stored (the code has changed, a file was damaged), and what was made from it would otherwise
claim an origin that no longer exists. They are removed before the first step is built, so a killed rebuild is continued
by a plain run.

Of several processes that torchrun started, the first one does all of this. The others follow it: they take part in the
steps that train, and wait through the rest.
"""

import errno
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from upweight.app.console import ConsoleMonitor, duration, size
from upweight.app.environment import environment, peak_memory_bytes, reset_peak_memory
from upweight.app.planner import Planned, plan
from upweight.app.recipe import Recipe, Step
from upweight.app.trackers import Trackers, check_trackers
from upweight.core.errors import StaleArtifact, UserError
from upweight.core.files import outside_paths, state_of
from upweight.core.identity import Difference, differences, plain
from upweight.core.work import Bar, Machine, Monitor, Work
from upweight.store.artifact import LocalStore, building_identity, described
from upweight.train import parallel

SMALLEST_FREE_BYTES = 1_000_000

MARK = ".fingerprint"

State = Literal["complete", "stale", "begun", "missing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a step stands: complete (it will be skipped), stale, begun by a run that was killed, or missing.

    Attributes:
        apart: where it is stale, the fields in which the stored artifact differs from what the recipe asks for; where
            it is missing, those in which what a killed run has begun differs, which is removed.
    """

    step: Step
    state: State
    apart: tuple[Difference, ...] = ()

    @property
    def own(self) -> list[Difference]:
        """The differences that are the step's own, not its inputs'."""
        return [item for item in self.apart if not (item.field.startswith("inputs.") and item.field.endswith(MARK))]


def standings(recipe: Recipe, store: LocalStore) -> list[Standing]:
    """How each step of `recipe` stands in `store`, inputs before what reads them."""
    return [_standing(recipe.step(name), identity, store) for name, identity in recipe.identities().items()]


def _standing(step: Step, identity: Mapping[str, object], store: LocalStore) -> Standing:
    stored = store.identity(step.name)
    if stored is not None:
        apart = tuple(differences(stored, plain(identity)))
        return Standing(step, "stale" if apart else "complete", apart)
    begun = building_identity(store.building(step.name))
    apart = tuple(differences(begun, plain(identity))) if begun else ()
    return Standing(step, "begun" if begun and not apart else "missing", apart)


def run(
    recipe: Recipe,
    root: Path,
    *,
    machine: Machine | None = None,
    console: Console | None = None,
    rebuild: Sequence[str] = (),
    until: str | None = None,
    track: Sequence[str] = (),
) -> LocalStore:
    """Build what is missing of `recipe` below `root` and return the store.

    Args:
        rebuild: steps to build anew, with everything that depends on them.
        until: the last step to build; None builds the goal.
        track: where metrics go besides metrics.jsonl, the kinds of app/trackers.py.

    Raises StaleArtifact before anything is built where an artifact on the way was built from other settings, RootInUse
    where another process holds the root, UserError where a stage refuses its input or the disk is full.
    """
    machine, console = machine or Machine(), console or Console()
    check_trackers(track)
    store = LocalStore(root, recipe.name)
    with parallel.joined(machine) as place:
        if machine.threads:
            torch.set_num_threads(machine.threads)
        if place.rank > 0:
            _follow(recipe, store, machine)
        else:
            _lead(recipe, store, machine, console, rebuild, until, track)
    return store


def _lead(
    recipe: Recipe,
    store: LocalStore,
    machine: Machine,
    console: Console,
    rebuild: Sequence[str],
    until: str | None,
    track: Sequence[str],
) -> None:
    wanted = recipe.until(until)
    doomed = [step.name for name in rebuild for step in recipe.dependents(name)]
    with _full_disk_explained(store.root), store.locked():
        _refuse_stale(recipe, store, wanted, spared=doomed)
        for step in wanted:
            if step.name not in doomed:
                store.check_place(step.name)
        for name in dict.fromkeys(doomed):
            store.discard(name)
        identities = recipe.identities()
        planned: dict[str, Planned] = {}
        began = time.monotonic()
        for number, step in enumerate(wanted, start=1):
            label = f"[{number}/{len(wanted)}] {step.name}"
            if store.check(step.name, identities[step.name]):
                console.print(
                    f"{label}: complete, skipped{written_since(step, store)}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
                continue
            standing = _standing(step, identities[step.name], store)
            resumed = " (going on)" if standing.state == "begun" else ""
            if standing.apart:
                resumed = f" (anew: what was begun is removed, {described(standing.own or list(standing.apart))})"
            console.print(f"{label}: {step.stage_name}{resumed}", highlight=False, markup=False, soft_wrap=True)
            planned = planned or {item.step: item for item in plan(recipe, machine)}
            _build(recipe, step, store, identities[step.name], machine, console, planned[step.name], track)
        parallel.told(None)
        console.print(
            f"{recipe.name}: {len(wanted)} steps complete below {store.directory} "
            f"(this run took {duration(time.monotonic() - began)})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def written_since(step: Step, store: LocalStore) -> str:
    """The end of a line about a complete step: which files outside the run are others now than those it has read."""
    was = (store.manifest(step.name) or {}).get("outside", {})
    changed = [path for path, state in was.items() if state_of(path, store.root) not in ("", state)]
    if not changed:
        return ""
    return f", although {', '.join(changed)} changed since it was read: --rebuild {step.name} reads it anew"


def _follow(recipe: Recipe, store: LocalStore, machine: Machine) -> None:
    """Take part in each step that the first process names, until it names none."""
    while (name := parallel.told()) is not None:
        step = recipe.step(name)
        inputs = {key: store.open(source.name) for key, source in step.inputs.items()}
        with tempfile.TemporaryDirectory() as out:
            work = Work(Path(out), inputs, machine, _Unheard(), step.seed(recipe.seed))
            step.stage.run(step.config, work)
        parallel.told()  # all are through: the first process completes the artifact now


def _run_stage(step: Step, work: Work) -> Any:
    """What the stage returns, run with all processes where it is made for them."""
    if not getattr(step.stage, "ALL_PROCESSES", False):
        with parallel.alone():
            return step.stage.run(step.config, work)
    parallel.told(step.name)
    summary = step.stage.run(step.config, work)
    parallel.told(step.name)
    return summary


class _Unheard(Monitor):
    """What a process shows that is not the first: nothing."""

    @contextmanager
    def track(self, label: str, *, total: float | int, unit: str, done: float | int = 0) -> Iterator[Bar]:
        yield _Still()

    def record(self, **metrics: Any) -> None:
        return

    def say(self, line: str) -> None:
        return


class _Still(Bar):
    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        return


def _build(
    recipe: Recipe,
    step: Step,
    store: LocalStore,
    identity: dict[str, object],
    machine: Machine,
    console: Console,
    planned: Planned,
    track: Sequence[str],
) -> None:
    states = {path: state_of(path, store.root) for path in outside_paths(step.config)}
    notes: dict[str, Any] = {"outside": {path: state for path, state in states.items() if state}}
    inputs = {key: store.open(source.name) for key, source in step.inputs.items()}
    started = datetime.now(UTC)
    processor = time.process_time()
    with store.create(step.name, identity, notes) as out:
        reset_peak_memory()
        trackers = Trackers(track, recipe=recipe.name, step=step.name, out=out) if track else None
        monitor = ConsoleMonitor(console, out, step.name, trackers=trackers)
        try:
            work = Work(out, inputs, machine, monitor, step.seed(recipe.seed))
            summary = _run_stage(step, work)
        finally:
            monitor.close()
        gc.collect()
        monitor.forget()
        notes["summary"] = _json(summary, step)
        notes["planned"] = {**asdict(planned.estimate), "seconds": round(planned.seconds, 3)}
        notes["timings"] = {
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(monitor.seconds, 3),
            "processor_seconds": round(time.process_time() - processor, 3),
            "attempts": monitor.attempts,
        }
        notes["peak_memory_bytes"] = peak_memory_bytes()
        notes["disk_bytes"] = directory_bytes(out)
        notes["environment"] = environment(machine)
    console.print(
        f"  {step.name}: complete in {duration(monitor.seconds)}, {size(notes['disk_bytes'])}",
        highlight=False,
        markup=False,
    )


def _refuse_stale(recipe: Recipe, store: LocalStore, wanted: Sequence[Step], spared: Sequence[str]) -> None:
    """Raise StaleArtifact naming the steps whose own fields differ, then those stale only because of these."""
    names = {step.name for step in wanted} - set(spared)
    stale = [item for item in standings(recipe, store) if item.state == "stale" and item.step.name in names]
    if not stale:
        return
    causes = [item for item in stale if item.own] or stale[:1]
    below = [item.step.name for item in stale if item not in causes]
    told = ". ".join(
        f"{store.directory / item.step.name} was built from other settings: {described(item.own or list(item.apart))}"
        for item in causes
    )
    also = f" What depends on it is stale too: {', '.join(below)}." if below else ""
    flags = " ".join(f"--rebuild {item.step.name}" for item in causes)
    raise StaleArtifact(
        f"{told}.{also} Rebuild with {flags} (this rebuilds what depends on it as well), "
        "restore the setting, or give the recipe another name to keep both."
    )


def _json(summary: object, step: Step) -> object:
    """The summary as JSON data. Raises TypeError, naming the step, where a stage returns anything else."""
    try:
        return json.loads(json.dumps(plain(summary)))
    except TypeError as error:
        raise TypeError(
            f"step {step.name}: stage {step.stage_name} returned a summary that is no JSON: {error}"
        ) from None


@contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one paragraph."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error, root):
            raise
        raise UserError(
            f"no space left on the disk that holds {root.resolve()} ({_free(root)} free): nothing half-written counts "
            "as complete. Make room, or name another disk with --root, and run again: it goes on where it was"
        ) from error


def _is_full_disk(error: BaseException | None, root: Path) -> bool:
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(seen).lower() or "os error 28" in str(seen):
            return True  # safetensors, tokenizers and arrow report the system's words without its number
        seen = seen.__cause__ or seen.__context__
    # torch's archive writer says only that it failed to write
    return (
        isinstance(error, (OSError, RuntimeError))
        and root.exists()
        and shutil.disk_usage(root).free < SMALLEST_FREE_BYTES
    )


def _free(root: Path) -> str:
    return size(shutil.disk_usage(root).free) if root.exists() else "nothing"


def directory_bytes(path: Path) -> int:
    """The size of all files below `path`."""
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
