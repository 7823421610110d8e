"""Model-written Python, run isolated: a warm fork-server inside bubblewrap; for each program a child with rlimits and
seccomp.

A program gets no network, no processes, no files but an interpreter to read and an empty scratch space that is thrown
away with it, an empty environment, and bounded time, memory, output and disk. How it ended is told by the fork-server
and the kernel, never by the program. Works as root and as an ordinary user, and refuses with `IsolationUnavailable`
where the kernel grants no user namespaces; `unsafe=True` then runs programs with rlimits and seccomp but without
namespaces: they can read, change and delete what this user can.

Runs are reproducible: hash seed and random seed are the same for every program.
"""

import atexit
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from upweight.rollout.enclosure import Enclosure
from upweight.rollout.execution import Execution, SandboxLimits, SandboxLost, execute

__all__ = ["Execution", "Sandbox", "SandboxLimits", "run_python", "shared_sandbox"]

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3
"""How often a program is started whose sandbox is lost."""


class Sandbox:
    """A pool of warm fork-servers, one program at a time in each. Safe to use from several threads.

    Args:
        limits: those of programs for which none are given.
        workers: how many programs run at once; the servers start when they are first needed.
        unsafe: where isolation is not to be had, run without namespaces instead of refusing.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, workers: int = 2, unsafe: bool = False) -> None:
        if workers < 1:
            raise ValueError(f"a sandbox of {workers} workers can run nothing")
        self.limits = limits or SandboxLimits()
        self.workers = workers
        self._unsafe = unsafe
        self._closed = False
        self._adopt()

    def _adopt(self) -> None:
        """Start empty in this process: servers of a parent that was forked answer the parent."""
        self._process = os.getpid()
        self._idle: list[Enclosure] = []
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self.workers)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the idle servers; those at work end with their run."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for enclosure in idle:
            enclosure.close()

    def run(self, code: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> Execution:
        """Run one program to its end."""
        return self._execute("program", code, stdin, limits, None)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` on each item, as many at once as there are workers; results in the items' order."""
        if self.workers == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(work, items))

    def run_calls(self, program: str, calls: Sequence[str], *, limits: SandboxLimits | None = None) -> Execution:
        """Run a program, then evaluate expressions in its namespace; `results` holds a JSON line for each.

        A line is {"index", "value"} with the value packed (see inside.pack), or {"index", "error": [type, message]}.
        The program could write these lines itself: they are its own claims.
        """
        source = json.dumps({"program": program, "calls": list(calls)})
        return self._execute("calls", source, "", limits, None)

    def run_tests(self, program: str, tests: Sequence[str], *, limits: SandboxLimits | None = None) -> Execution:
        """Run test sources against a program that lives in another process; `results` holds a JSON line for each test.

        A line is {"index", "kind", "failure"}; an empty failure is a passed test. The program has no way to write here.
        """
        return self._execute("tests", json.dumps(list(tests)), "", limits, program)

    def _execute(
        self, role: str, source: str, stdin: str, limits: SandboxLimits | None, candidate: str | None
    ) -> Execution:
        for attempt in range(ATTEMPTS):
            try:
                with self._enclosure() as enclosure:
                    bounds = limits or self.limits
                    return execute(enclosure, role, source, stdin=stdin, limits=bounds, candidate=candidate)
            except SandboxLost as error:
                if attempt == ATTEMPTS - 1:
                    raise RuntimeError(f"{error} {ATTEMPTS} times under the same program: is memory short?") from error
        raise AssertionError("the last attempt returns or raises")

    @contextlib.contextmanager
    def _enclosure(self) -> Iterator[Enclosure]:
        if os.getpid() != self._process:
            self._adopt()
        with self._free:
            enclosure = self._take() or Enclosure.open(unsafe=self._unsafe)
            finished = False
            try:
                yield enclosure
                finished = True
            finally:
                # an interrupted run leaves its answer in the channel, so its server is not used again
                with self._lock:
                    keep = finished and not self._closed and enclosure.alive()
                    if keep:
                        self._idle.append(enclosure)
                if not keep:
                    enclosure.close()

    def _take(self) -> Enclosure | None:
        with self._lock:
            while self._idle:
                enclosure = self._idle.pop()
                if enclosure.alive():
                    return enclosure
                enclosure.close()
        return None


_shared: dict[bool, Sandbox] = {}
_shared_lock = threading.Lock()


def shared_sandbox(*, unsafe: bool = False) -> Sandbox:
    """The pool of this process, as wide as the machine has processors (8 at most), closed when the process ends."""
    with _shared_lock:
        if unsafe not in _shared:
            _shared[unsafe] = Sandbox(workers=min(len(os.sched_getaffinity(0)), 8), unsafe=unsafe)
            atexit.register(_shared[unsafe].close)
        return _shared[unsafe]


def run_python(code: str, *, stdin: str = "", limits: SandboxLimits | None = None, unsafe: bool = False) -> Execution:
    """Run one model-written program in the shared pool.

    Raises IsolationUnavailable where it cannot be isolated; `unsafe=True` runs it there without namespaces, with a
    warning.
    """
    return shared_sandbox(unsafe=unsafe).run(code, stdin=stdin, limits=limits)
