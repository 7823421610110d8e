"""Equality of mathematical expressions by math-verify, in processes that can be killed.

math-verify refuses to run in threads, and an expression such as 9^{9^{9^9}} keeps sympy busy for ever, so every
comparison runs in a worker process with limits on processor time and memory. Workers start when first needed, serve
many comparisons, and are replaced when they die.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Literal

Outcome = Literal["equal", "different", "timed out"]

WALL_SECONDS_PER_CPU_SECOND = 20.0
"""The second limit, for a worker that waits and does not compute; wide, since a busy machine must not decide."""
START_SECONDS = 300.0

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_POWER = re.compile(r"\^(-?[0-9]{2,})")


class _WorkerDied(Exception):
    """The worker exceeded its limits and is gone."""


class _Worker:
    def __init__(self) -> None:
        # -P: the room's own file names must not shadow modules of others.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        try:
            self._read(START_SECONDS)
        except _WorkerDied as died:
            raise RuntimeError(
                f"the process that compares answers did not start (exit code {self.process.wait()}): "
                f"run `{sys.executable} -P {_WORKER}` to see why"
            ) from died

    def equal(self, candidate: str, reference: str, cpu_seconds: int) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([candidate, reference, cpu_seconds]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as broken:
            self.kill()
            raise _WorkerDied from broken
        return self._read(cpu_seconds * WALL_SECONDS_PER_CPU_SECOND) is True

    def _read(self, wall_seconds: float) -> object:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], wall_seconds)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.kill()
            raise _WorkerDied
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class _Workers:
    """Idle workers. As many run as threads ask at once; a forked child does not touch those of its parent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._owner = os.getpid()

    def compare(self, candidate: str, reference: str, cpu_seconds: int) -> Outcome:
        worker = self._take()
        try:
            outcome: Outcome = "equal" if worker.equal(candidate, reference, cpu_seconds) else "different"
        except _WorkerDied:
            return "timed out"
        except BaseException:
            worker.kill()  # its answer would be read as that of the next question
            raise
        with self._lock:
            self._idle.append(worker)
        return outcome

    def _take(self) -> _Worker:
        with self._lock:
            if self._owner != os.getpid():
                self._owner, self._idle = os.getpid(), []
            if self._idle:
                return self._idle.pop()
        return _Worker()

    def close(self) -> None:
        with self._lock:
            if self._owner == os.getpid():
                for worker in self._idle:
                    worker.kill()
            self._idle = []


_WORKERS = _Workers()
atexit.register(_WORKERS.close)


@lru_cache(maxsize=16384)
def compare_expressions(candidate: str, reference: str, cpu_seconds: int) -> Outcome:
    """Whether two LaTeX or plain expressions mean the same; "timed out" where that took more than `cpu_seconds` of
    processor time or 4 GiB. Outcomes are remembered, so a group that repeats a hanging answer waits for it once."""
    return _WORKERS.compare(_as_latex(candidate), _as_latex(reference), cpu_seconds)


def _as_latex(text: str) -> str:
    text = _PI.sub(r"\\pi", text.replace("**", "^"))
    return _POWER.sub(r"^{\1}", text)
