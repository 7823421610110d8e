"""Contenders take turns on one machine, each in a process of its own.

A contender sets itself up, warms up, and then works only while it has its turn: a few steps, timed in CPU-seconds. The
turns go round, so that what else the machine does falls on all alike, and the ratio of two contenders is taken round by
round. CPU-seconds and not wall time, because a shared machine takes the processor away.
"""

import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from benchmarks.work import Work


@dataclass(frozen=True, slots=True)
class Turn:
    """What one contender did in one turn.

    Attributes:
        units: tokens, or whatever the contender counts.
        cpu_seconds: of all threads of its process.
        peak_bytes: the most memory that the process has held so far.
    """

    units: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def speed(self) -> float:
        """Units a CPU-second."""
        return self.units / self.cpu_seconds


class Turns:
    """The contender's side: it calls `step` after each of its steps, and is held there while others have their turn."""

    def __init__(self, connection: Connection, warmup: int, steps: int) -> None:
        self._connection, self._left, self._steps = connection, warmup, steps
        self._warm = False
        self._units = 0.0
        self._told = 0.0
        self._started = time.process_time()

    def step(self, units: float, cpu_seconds: float = 0.0) -> bool:
        """Count one step. False when there will be no further turn.

        Args:
            cpu_seconds: what the step took, of work that is done in other processes; otherwise this one's is taken.
        """
        self._left -= 1
        self._units += units
        self._told += cpu_seconds
        if self._left:
            return True
        spent = self._told or time.process_time() - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._connection.send(Turn(self._units, spent, peak) if self._warm else None)
        self._warm = True
        self._left = self._steps
        goes_on = bool(self._connection.recv())
        self._units = self._told = 0.0
        self._started = time.process_time()
        return goes_on


Contender = Callable[[Turns, Work], None]
"""Trains on some work until `Turns.step` returns False."""


def _enter(contender: Contender, work: Work, connection: Connection, warmup: int, steps: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # trainers print; the table is the parent's
    torch.set_num_threads(1)
    try:
        contender(Turns(connection, warmup, steps), work)
    except Exception:  # noqa: BLE001 the parent says which contender failed, with this traceback
        connection.send(traceback.format_exc())


@dataclass
class _Seat:
    process: BaseProcess
    connection: Connection


def contest(
    contenders: Mapping[str, Contender], work: Work, *, rounds: int, steps: int, warmup: int
) -> dict[str, list[Turn]]:
    """The turns of each contender, round by round.

    Args:
        warmup: steps before the first turn that are not counted (compilation, allocation).
        steps: of one turn.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = get_context("spawn")
    seats: dict[str, _Seat] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    try:
        for name, contender in contenders.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_enter, args=(contender, work, theirs, warmup, steps), daemon=True)
            process.start()
            seats[name] = _Seat(process, ours)
            _heard(name, seats[name])  # one after another: warming up together would need the memory of all at once
            print(f"{work.name}: {name} is warm", file=sys.stderr)
        for index in range(rounds):
            for name, seat in seats.items():
                seat.connection.send(True)
                turn = _heard(name, seat)
                assert turn is not None
                turns[name].append(turn)
                print(f"{work.name}: round {index + 1}, {name}: {turn.speed:,.2f} a CPU-second", file=sys.stderr)
        for seat in seats.values():
            seat.connection.send(False)
    finally:
        for seat in seats.values():
            seat.process.join(timeout=5)
            if seat.process.is_alive():
                seat.process.terminate()
    return turns


def _heard(name: str, seat: _Seat) -> Turn | None:
    try:
        message = seat.connection.recv()
    except EOFError:
        raise RuntimeError(f"{name} ended without a word, exit code {seat.process.exitcode}") from None
    if isinstance(message, str):
        raise RuntimeError(f"{name} failed:\n{message}")
    assert message is None or isinstance(message, Turn)
    return message


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs, round by round: the median, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of figures measured in the same rounds."""
    parts = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(parts), min(parts), max(parts))
