"""The trainer's own checkpoints: everything that a killed run needs to go on as if it had not been killed.

A checkpoint is a directory that appears whole or not at all: it is written beside its name, flushed to the disk and
renamed. It holds weights, optimizer, the loader's state, the counters, the random states of torch, and the identity of
the run, so that a run with other settings is refused.

- One process, or several that hold the same weights: the first one writes all tensors into one file.
- Sharded: each process writes its own parts (torch.distributed.checkpoint), from a copy, while training goes on. The
  directory has to be one that all of them see.

Either is loaded by any number of processes, sharded or not.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upweight.core.errors import Refusal, UserError
from upweight.core.identity import canonical_json, differences
from upweight.train.optimizer import Optimizer
from upweight.train.parallel import everyone, told, world
from upweight.train.sharding import is_sharded, laid_like

STATE_FILE = "state.pt"
RECORD_FILE = "record.json"
PARTS = "parts"
DIFFERENCES_SHOWN = 4
UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
)
"""What JSON, torch and pickle make of a file that is cut off or overwritten."""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Where checkpoints go, after how many optimizer steps, and how many of the newest are kept."""

    directory: Path
    every_steps: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise UserError(f"a checkpoint every {self.every_steps} steps, {self.keep} kept: both must be at least 1")


@dataclass(frozen=True, slots=True)
class Restored:
    """What the trainer takes up beside the weights and the optimizer: its counters and the loader's state."""

    counters: Mapping[str, Any]
    loader: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        identity: plain JSON; a checkpoint of another identity is refused.
    """

    def __init__(self, config: CheckpointConfig, identity: Mapping[str, Any]) -> None:
        self.config = config
        self.identity = json.loads(canonical_json(identity))
        self.directory = Path(told(str(config.directory)))  # the first process's: it begins and completes them
        self._group: Any = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._begun: Future[None] | None = None

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*")) if self.directory.exists() else []

    def write(
        self, policy: nn.Module, updater: Optimizer, *, loader: Mapping[str, Any], counters: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint named by counters["step"] and remove all but the newest `keep`.

        That of a sharded policy is only begun: `finish`, and the next call, wait for it.
        """
        self.finish()
        step = int(counters["step"])
        tensors, rest = _apart(policy, updater)
        state = {"rest": rest, "random": everyone(_random_state())}
        record = {"counters": counters, "loader": loader, "identity": self.identity}
        if is_sharded(policy) and world().size > 1:
            self._begin(step, tensors, state, record)
            return
        if world().rank == 0:
            self._prepare(step, {"tensors": tensors, **state}, record)
            self._complete(step)
        if world().size > 1:
            dist.barrier()

    def finish(self) -> None:
        """Wait for the checkpoint that was begun. Raises what kept it from being written."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            begun.result()
            dist.barrier()

    def _begin(self, step: int, tensors: dict[str, Tensor], state: object, record: object) -> None:
        """Copy this process's parts, and write them in a thread."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        if self._group is None:
            # one of its own, since the trainer exchanges sums meanwhile
            self._group = dist.new_group(backend="gloo")
        if world().rank == 0:
            self._prepare(step, state, record)
        dist.barrier(self._group)
        written: Any = async_save(tensors, checkpoint_id=self._building(step) / PARTS, process_group=self._group)

        def wait() -> None:
            try:
                written.result()
            except BaseException as error:
                raise UserError(f"the checkpoint of step {step} could not be written: {_told_by(error)}") from error
            if world().rank == 0:  # whose future is done when all have written
                self._complete(step)

        self._begun = self._thread.submit(wait)

    def _building(self, step: int) -> Path:
        return self.directory / f".building-{step:09d}"

    def _prepare(self, step: int, state: object, record: object) -> None:
        building = self._building(step)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _flushed(building / STATE_FILE, lambda path: torch.save(state, path))
        _flushed(building / RECORD_FILE, lambda path: path.write_text(json.dumps(record)))

    def _complete(self, step: int) -> None:
        building, final = self._building(step), self.directory / f"step-{step:09d}"
        if (building / PARTS).exists():
            _flush_directory(building / PARTS)
        _flush_directory(building)
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        _flush_directory(self.directory)
        for old in self.complete()[: -self.config.keep]:
            shutil.rmtree(old)
        for remains in self.directory.glob(".building-*"):
            shutil.rmtree(remains)

    def restore(self, policy: nn.Module, updater: Optimizer) -> Restored | None:
        """Put the newest checkpoint into `policy`, `updater` and torch's random state; None where there is none.

        Raises Refusal where it is of another identity, UserError where it cannot be read.
        """
        found = self.complete()
        newest: Path | None = told(found[-1] if found else None)  # that of the first process, which writes them
        if newest is None:
            return None
        try:
            record = json.loads((newest / RECORD_FILE).read_text())
            odd = differences(record["identity"], self.identity)
        except UNREADABLE as error:
            raise _unreadable(newest, error) from error
        if odd:
            shown = "; ".join(f"{item.field} was {item.stored}, now {item.wanted}" for item in odd[:DIFFERENCES_SHOWN])
            raise Refusal(
                f"the checkpoint {newest} is of another run: {shown}. Give this run a directory of its own, or remove "
                f"{self.directory} to start anew"
            )
        try:
            state = torch.load(newest / STATE_FILE, map_location="cpu", weights_only=True)
            tensors = state.get("tensors") or _parts(newest / PARTS, policy)
            _put(tensors, state["rest"], policy, updater)
            _set_random_states(state["random"])
            return Restored(record["counters"], record["loader"])
        except UNREADABLE as error:
            raise _unreadable(newest, error) from error


def _unreadable(checkpoint: Path, error: BaseException) -> UserError:
    return UserError(
        f"the checkpoint {checkpoint} cannot be read ({_told_by(error)}): remove it, and the run goes on from the one "
        "before"
    )


def _told_by(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MODEL, OPTIMIZER = "model.", "optimizer."


def _apart(policy: nn.Module, updater: Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """All tensors by flat names, and what of the optimizer's state is no tensor."""
    tensors = {f"{MODEL}{name}": value for name, value in policy.state_dict().items()}
    rest: dict[str, dict[str, Any]] = {}
    for parameter, entry in updater.state().items():
        rest[parameter] = {}
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{name}.{parameter}"] = value
            else:
                rest[parameter][name] = value
    return tensors, rest


def _put(
    tensors: Mapping[str, Tensor], rest: Mapping[str, Mapping[str, Any]], policy: nn.Module, updater: Optimizer
) -> None:
    """The inverse of `_apart`."""
    here = policy.state_dict()
    weights = {name: tensors[f"{MODEL}{name}"] for name in here}
    policy.load_state_dict({name: laid_like(value, here[name]) for name, value in weights.items()})
    states = {parameter: dict(entry) for parameter, entry in rest.items()}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, parameter = key.removeprefix(OPTIMIZER).partition(".")
            states.setdefault(parameter, {})[name] = value
    updater.restore(states)


def _parts(directory: Path, policy: nn.Module) -> dict[str, Tensor]:
    """The tensors that several processes wrote: each process reads what it holds, or all where it holds all."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    parameters = dict(policy.named_parameters())
    try:
        stored = FileSystemReader(directory).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for key, kept in stored.items():
            if not isinstance(kept, TensorStorageMetadata):
                continue
            name = key.removeprefix(MODEL) if key.startswith(MODEL) else key.removeprefix(OPTIMIZER).partition(".")[2]
            reference = parameters.get(name)
            if reference is not None and hasattr(reference, "full_tensor") and reference.shape == kept.size:
                tensors[key] = torch.empty_like(reference, dtype=kept.properties.dtype)
            else:
                tensors[key] = torch.empty(kept.size, dtype=kept.properties.dtype)
        load(tensors, checkpoint_id=directory, no_dist=world().size == 1)
    except CheckpointException as error:  # no Exception, as the processes' own are: one of these is told
        raise RuntimeError(_told_by(next(iter(error.failures.values()))[0])) from error
    return tensors


def _random_state() -> dict[str, Tensor]:
    """Torch's random states of this process."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    return mine


def _set_random_states(states: list[dict[str, Tensor]]) -> None:
    """Take up this process's state; a process that was not there before goes on with its own."""
    if world().rank < len(states):
        mine = states[world().rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])


def _flushed(path: Path, write_to: Callable[[Path], Any]) -> None:
    write_to(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_counters(directory: Path) -> Mapping[str, Any]:
    """The counters of the newest checkpoint; empty where there is none."""
    found = sorted(directory.glob("step-*"))
    counters: Mapping[str, Any] = json.loads((found[-1] / RECORD_FILE).read_text())["counters"] if found else {}
    return counters


def discard(directory: Path) -> None:
    """Remove the checkpoints of a run that has ended, as the last thing that its stage does: whoever is killed before
    goes on from them, and afterwards trains anew. They vanish at once, since half of one cannot be read."""
    left = directory.with_name(f".{directory.name}-left")
    shutil.rmtree(left, ignore_errors=True)
    if directory.exists():
        directory.rename(left)
    shutil.rmtree(left, ignore_errors=True)
