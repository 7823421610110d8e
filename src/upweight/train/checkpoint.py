"""The trainer's own checkpoints: everything that a killed run needs to go on as if it had not been killed.

A checkpoint is a directory that appears whole or not at all: it is written beside its name, flushed to the disk and
renamed. It holds weights, optimizer, the loader's state, the counters, the random states of torch, and the identity of
the run, so that a run with other settings is refused. With several processes the first one writes; sharded tensors are
gathered for it, so a checkpoint is loaded by any number of processes, sharded or not.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from upweight.core.errors import Refusal, UserError
from upweight.core.identity import canonical_json, differences
from upweight.train.optimizer import Optimizer
from upweight.train.parallel import gathered, laid_like, told, world

STATE_FILE = "state.pt"
RECORD_FILE = "record.json"
DIFFERENCES_SHOWN = 4


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

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        directory = self.config.directory
        return sorted(directory.glob("step-*")) if directory.exists() else []

    def write(
        self, policy: nn.Module, updater: Optimizer, *, loader: Mapping[str, Any], counters: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint named by counters["step"] and remove all but the newest `keep`."""
        state = {
            "model": {name: gathered(value) for name, value in policy.state_dict().items()},
            "optimizer": updater.state(),
            "random": _random_states(),
        }
        if world().rank == 0:
            record = {"counters": counters, "loader": loader, "identity": self.identity}
            self._write(int(counters["step"]), state, record)
        if world().size > 1:
            dist.barrier()

    def _write(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        directory = self.config.directory
        final, building = directory / f"step-{step:09d}", directory / f".building-{step:09d}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        _flushed(building / STATE_FILE, lambda path: torch.save(state, path))
        _flushed(building / RECORD_FILE, lambda path: path.write_text(json.dumps(record)))
        _flush_directory(building)
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        _flush_directory(directory)
        for old in self.complete()[: -self.config.keep]:
            shutil.rmtree(old)
        for remains in directory.glob(".building-*"):
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
            state = torch.load(newest / STATE_FILE, map_location="cpu", weights_only=True)
            odd = differences(record["identity"], self.identity)
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the checkpoint {newest} cannot be read ({why}): remove it, and the run goes on from the one before"
            ) from error
        if odd:
            shown = "; ".join(f"{item.field} was {item.stored}, now {item.wanted}" for item in odd[:DIFFERENCES_SHOWN])
            raise Refusal(
                f"the checkpoint {newest} is of another run: {shown}. Give this run a directory of its own, or remove "
                f"{self.config.directory} to start anew"
            )
        here = policy.state_dict()
        policy.load_state_dict({name: laid_like(value, here[name]) for name, value in state["model"].items()})
        updater.restore(state["optimizer"])
        _set_random_states(state["random"])
        return Restored(record["counters"], record["loader"])


def _random_states() -> list[dict[str, torch.Tensor]]:
    """Torch's random states, one entry a process."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    everyone = [mine] * world().size
    if world().size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def _set_random_states(states: list[dict[str, torch.Tensor]]) -> None:
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


def discard(directory: Path) -> None:
    """Remove the checkpoints of a run that has ended: its model is saved, and nothing goes on from them."""
    shutil.rmtree(directory, ignore_errors=True)
