"""One run in a sandbox, from the host's side: hand out descriptors, read what is written, end it in time."""

import fcntl
import math
import os
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upweight.rollout.enclosure import Enclosure

GRACE_SECONDS = 5.0
"""How long past its time limit a program may take to be ended before its whole sandbox is."""

_PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one program may use.

    Attributes:
        cpu_seconds: processor time, over all threads, in whole seconds; one more for a program that ignores SIGXCPU.
        wall_seconds: time from start to end.
        memory_bytes: address space, the interpreter's own 30 MB included.
        processes: tasks of the sandbox, which is threads, since starting processes is refused altogether. The kernel
            does not count those of root: there the memory bounds them.
        output_bytes: standard output, standard error and results together; a program that writes more is ended.
        disk_bytes: scratch space, held in memory.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_bytes: int = 256 << 20
    processes: int = 32
    output_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"the sandbox limit {name} is {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True, slots=True)
class Execution:
    """How a program ended.

    Attributes:
        exit_code: that of the process; negative for a signal.
        timed_out: it used up its wall or processor time.
        output_exceeded: it was ended for writing too much; what it wrote up to there is kept.
        memory_bytes: peak of resident memory.
        isolated: False where it ran unsafe, by request.
        results: what the harness inside wrote, raw. A program run with `calls` can write there too.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    output_exceeded: bool
    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    isolated: bool
    results: bytes = b""

    @property
    def ok(self) -> bool:
        """It ended by itself, with exit code 0."""
        return self.exit_code == 0 and not self.timed_out and not self.output_exceeded


class SandboxLost(Exception):
    """The fork-server ended under a program, which no program can bring about by itself: memory ran out, or a kill."""


class _Wires:
    """The descriptors of a run: pipes read here, and the ends that go inside."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.read: list[int] = []

    def give(self, descriptor: int) -> int:
        """Own a descriptor that goes inside; its place in the list that is sent."""
        self.inside.append(descriptor)
        return len(self.inside) - 1

    def pipe(self) -> int:
        """A pipe out of the sandbox; the place of its writing end."""
        read, write = os.pipe()
        self.read.append(read)
        return self.give(write)

    def text(self, content: str, errors: str = "surrogatepass") -> int:
        """A sealed file in memory, so that nobody inside can make it grow.

        A program may hold half of a surrogate pair, which JSON can write: that is for the interpreter inside to refuse.
        """
        descriptor = os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        place = self.give(descriptor)
        data = memoryview(content.encode("utf-8", errors))
        while data:
            data = data[os.write(descriptor, data) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        return place

    def pair(self) -> tuple[int, int]:
        """Two ends of a socket, both of which go inside."""
        one, other = socket.socketpair()
        return self.give(one.detach()), self.give(other.detach())

    def nothing(self) -> int:
        """/dev/null."""
        return self.give(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))

    def close(self, descriptors: list[int]) -> None:
        while descriptors:
            os.close(descriptors.pop())


def execute(
    enclosure: Enclosure, role: str, source: str, *, stdin: str, limits: SandboxLimits, candidate: str | None = None
) -> Execution:
    """Run `source` in its role; beside it, as a process of its own, the candidate that a test is about."""
    wires = _Wires()
    try:
        out, err, result, text = wires.pipe(), wires.pipe(), wires.pipe(), wires.text(source)
        standard = [wires.text(stdin, "surrogateescape"), out, err]
        if candidate is None:
            roles = [{"role": role, "descriptors": [*standard, result, text]}]
        else:
            (one, other), nothing = wires.pair(), wires.nothing()
            roles = [
                {"role": role, "descriptors": [nothing, nothing, nothing, result, one, text]},
                {"role": "candidate", "descriptors": [*standard, other, wires.text(candidate)]},
            ]
        with tempfile.TemporaryDirectory(prefix="scratch-", ignore_cleanup_errors=True) as scratch:
            place = "/tmp" if enclosure.isolated else scratch
            try:
                enclosure.send({"roles": roles, "limits": _plain(limits), "scratch": place}, wires.inside)
            except ConnectionError as error:
                raise SandboxLost("the sandbox's fork-server ended before the program began") from error
            wires.close(wires.inside)
            return _follow(enclosure, wires.read, limits)
    finally:
        wires.close(wires.inside)
        wires.close(wires.read)


def _plain(limits: SandboxLimits) -> dict[str, int | float]:
    return {
        "cpu": math.ceil(limits.cpu_seconds),
        "wall": limits.wall_seconds,
        "memory": limits.memory_bytes,
        "disk": limits.disk_bytes,
        "processes": limits.processes,
    }


def _follow(enclosure: Enclosure, pipes: Sequence[int], limits: SandboxLimits) -> Execution:
    """Read until the program has ended and everything that it wrote has come."""
    written: dict[int, list[bytes]] = {pipe: [] for pipe in pipes}
    left, exceeded = limits.output_bytes, False
    answer: Mapping[str, Any] | None = None
    deadline = time.monotonic() + limits.wall_seconds + GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        control = selector.register(enclosure.control, selectors.EVENT_READ).fd
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                enclosure.broken = True
                break
            for key, _ in ready:
                if key.fd == control:
                    answer = enclosure.receive()
                    selector.unregister(control)
                    if answer is None:
                        raise SandboxLost("the sandbox's fork-server ended")
                    continue
                piece = os.read(key.fd, _PIECE_BYTES)
                if not piece:
                    selector.unregister(key.fd)
                    continue
                written[key.fd].append(piece[: max(left, 0)])
                left -= len(piece)
                if left < 0 and not exceeded:
                    exceeded = True
                    if answer is None:
                        enclosure.end_run()
    stdout, stderr, results = (b"".join(written[pipe]) for pipe in pipes)
    return _execution(enclosure, answer, stdout, stderr, results, exceeded, limits)


def _execution(
    enclosure: Enclosure,
    answer: Mapping[str, Any] | None,
    stdout: bytes,
    stderr: bytes,
    results: bytes,
    exceeded: bool,
    limits: SandboxLimits,
) -> Execution:
    if answer is None:  # the whole sandbox has to be ended, because its program could not be
        answer = {"ends": [{"exit": -9, "cpu": 0.0, "memory": 0}], "timed_out": True, "wall": limits.wall_seconds}
    ends = answer["ends"]
    cpu = sum(end["cpu"] for end in ends)
    # the kernel counts more finely than it reports: a program that it ended for its time may show a little less
    used_up = any(end["exit"] == -signal.SIGXCPU or end["cpu"] >= limits.cpu_seconds for end in ends)
    return Execution(
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        exit_code=ends[0]["exit"],
        timed_out=bool(answer["timed_out"]) or used_up,
        output_exceeded=exceeded,
        wall_seconds=answer["wall"],
        cpu_seconds=cpu,
        memory_bytes=max(end["memory"] for end in ends),
        isolated=enclosure.isolated,
        results=results,
    )
