"""Processes that judge one request after another and are killed when a request takes too long.

A worker reads one JSON request a line from its standard input and answers each with one line of JSON; its first line
says that it is ready. It bounds its own processor time. Workers start when first needed, serve many requests, and are
replaced when they die.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WALL_SECONDS_PER_CPU_SECOND = 20.0
"""The second limit, for a worker that waits and does not compute; wide, since a busy machine must not decide."""
START_SECONDS = 300.0


class WorkerDied(Exception):
    """The worker exceeded its limits and is gone."""


class Workers:
    """Idle workers of one kind. As many run as threads ask at once; a forked child does not touch those of its parent.

    Args:
        command: makes the command line of a worker and its environment, when the first one is started.
    """

    def __init__(self, command: Callable[[], tuple[Sequence[str], Mapping[str, str]]]) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._owner = os.getpid()
        atexit.register(self.close)

    def ask(self, request: Any, cpu_seconds: float | int) -> Any:
        """The answer to a request. Raises WorkerDied where the worker ended under it, or was ended for being late."""
        worker = self._take()
        try:
            answer = worker.ask(request, cpu_seconds)
        except WorkerDied:
            raise
        except BaseException:
            worker.kill()  # its answer would be read as that of the next request
            raise
        with self._lock:
            self._idle.append(worker)
        return answer

    def close(self) -> None:
        """End the idle workers."""
        with self._lock:
            if self._owner == os.getpid():
                for worker in self._idle:
                    worker.kill()
            self._idle = []

    def _take(self) -> "_Worker":
        with self._lock:
            if self._owner != os.getpid():
                self._owner, self._idle = os.getpid(), []
            while self._idle:
                worker = self._idle.pop()
                # one that ended while it waited, for want of memory say, has no verdict on this request
                if worker.process.poll() is None:
                    return worker
        return _Worker(*self._command())


class _Worker:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            text=True,
            start_new_session=True,  # a group of its own, to be killed with what it started
        )
        try:
            self._read(START_SECONDS)
        except WorkerDied as died:
            raise RuntimeError(
                f"a process that judges answers did not start (exit code {self.process.wait()}): "
                f"run `{' '.join(command)}` to see why"
            ) from died

    def ask(self, request: Any, cpu_seconds: float | int) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as broken:
            self.kill()
            raise WorkerDied from broken
        return self._read(cpu_seconds * WALL_SECONDS_PER_CPU_SECOND)

    def _read(self, wall_seconds: float) -> Any:
        assert self.process.stdout is not None
        poll = select.poll()  # select knows no descriptors beyond 1023
        poll.register(self.process.stdout, select.POLLIN)
        line = self.process.stdout.readline() if poll.poll(1000 * wall_seconds) else ""
        if not line:
            self.kill()
            raise WorkerDied
        return json.loads(line)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
