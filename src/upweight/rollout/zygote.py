"""The fork-server inside the sandbox: one warm interpreter that forks a confined child for each program.

Standard library only; it runs under bubblewrap and never imports the rest of the package. Starting an interpreter
costs several milliseconds, forking a warm one less than one.

What a child could reach is what this process held when it forked, so it holds nothing worth having: programs, inputs
and tests arrive as file descriptors that only the child which they are meant for reads, and outputs go from the child
to the host without passing through here. The children cannot signal, trace or read this process (see seccomp.py), and
only this process tells the host how they ended.

The control channel, handed over as standard input, is a sequenced-packet socket. A request is JSON with the limits and
the roles, with the descriptors attached; the answer is JSON with each child's exit status, times and peak memory. While
children run, any message means: kill them; end of file means: the host is gone, so end everything.
"""
# ruff: noqa: BLE001, SIM115 - foreign code may raise anything, and its standard streams stay open as long as it runs

import array
import atexit
import contextlib
import gc
import json
import os
import random
import resource
import select
import site
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from upweight.rollout import inside, seccomp

SETUP_FAILED = 125
SCRATCH_FILES = 4096

_PRELOADED = (
    "bisect collections copy dataclasses datetime decimal enum fractions functools heapq io itertools math operator "
    "re statistics string typing"
)
_BOUNDED = "AS CPU FSIZE NPROC NOFILE CORE MEMLOCK MSGQUEUE STACK"
_FIXED_BOUNDS = (64, 0, 0, 0, 8 << 20)
_HARD_LIMITS = [
    (which, sys.maxsize if most == resource.RLIM_INFINITY else most)
    for which, most in (
        (which, resource.getrlimit(which)[1])
        for which in (getattr(resource, f"RLIMIT_{name}") for name in _BOUNDED.split())
    )
]


def serve() -> None:
    """Answer requests until the host closes the channel."""
    for name in _PRELOADED.split():
        __import__(name)
    site.setquit()  # exit() and quit(), which an interpreter started with -S does not have
    isolated = sys.argv[1] == "isolated"
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    scratch = Scratch() if isolated else None
    self_test = _self_test(scratch)
    seccomp.assemble(0)
    gc.collect()
    gc.freeze()  # children then copy no pages for reference counts of collected objects
    control.send(json.dumps({"ready": self_test}).encode())
    while True:
        message, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_SPACE(4 * 16))
        if not message:
            os._exit(0)
        descriptors = array.array("i")
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data)
        request = json.loads(message)
        control.send(json.dumps(_run(control, request, list(descriptors), scratch)).encode())


class Scratch:
    """The one place where programs may write: a file system in memory, mounted anew once a program left files in it."""

    path = "/tmp"

    def __init__(self) -> None:
        self.size = 0

    def prepare(self, size: int) -> None:
        """Empty, and of this size."""
        if self.size:
            os.chmod(self.path, 0o700)  # first: a program may have shut the next one, and this process, out
        if self.size and (size != self.size or os.listdir(self.path)):
            # taken away whole, since deleting would have to walk whatever a program built; costs some milliseconds
            seccomp.unmount(self.path)
            self.size = 0
        if not self.size:
            seccomp.mount_scratch(self.path, size, SCRATCH_FILES)
            self.size = size


def _self_test(scratch: Scratch | None) -> str:
    """Empty where a confined child is indeed confined; otherwise what failed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if scratch is not None:
                scratch.prepare(1 << 20)
            _confine({"memory": 1 << 30, "cpu": 5, "disk": 1 << 20, "processes": 8})
            try:
                socket.socket().close()
                found = "a confined program could still open a socket"
            except PermissionError:
                found = "ok"
        except OSError as error:
            found = str(error)
        os.write(write, found.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    if scratch is not None:
        scratch.size = 1 << 20
    with os.fdopen(read, "rb") as stream:
        found = stream.read().decode()
    return "" if found == "ok" else found or "the self-test ended early"


def _run(control: socket.socket, request: Any, descriptors: list[int], scratch: Scratch | None) -> dict[str, Any]:
    """Fork the children of one request, wait for the first of them, end the others.

    `request["roles"]` names, for each child, what it does and which of the descriptors become its 0, 1, 2, ...; the
    last one holds its program.
    """
    limits = request["limits"]
    if scratch is not None:
        scratch.prepare(limits["disk"])
    children = []
    started = time.monotonic()
    try:
        for role in request["roles"]:
            pid = os.fork()
            if pid == 0:
                _child(role["role"], [descriptors[index] for index in role["descriptors"]], limits, request["scratch"])
            children.append((pid, os.pidfd_open(pid)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    timed_out = _wait(control, children[0][1], started + limits["wall"])
    ends = []
    for pid, handle in children:
        os.kill(pid, 9)
        _, status, usage = os.wait4(pid, 0)
        os.close(handle)
        cpu = usage.ru_utime + usage.ru_stime
        ends.append({"exit": os.waitstatus_to_exitcode(status), "cpu": cpu, "memory": usage.ru_maxrss * 1024})
    return {"ends": ends, "timed_out": timed_out, "wall": time.monotonic() - started}


def _wait(control: socket.socket, child: int, deadline: float) -> bool:
    """Until the child ends (False), its time is over (True), or the host asks for its end (False)."""
    poll = select.poll()
    poll.register(child, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        ready = dict(poll.poll(left * 1000))
        if control.fileno() in ready:
            if not control.recv(64):
                os._exit(0)  # the process namespace ends with its first process, the children too
            return False
        if child in ready:
            return False


def _confine(limits: Any) -> None:
    """Limits first, then no capabilities, then the filter: after this line the program may run."""
    bounds = (limits["memory"], limits["cpu"], limits["disk"], limits["processes"], *_FIXED_BOUNDS)
    for (which, most), bound in zip(_HARD_LIMITS, bounds, strict=True):
        bound = min(bound, most)
        # SIGXCPU says why the program ended, which SIGKILL, a second later for one that is deaf to it, does not
        hard = min(bound + 1, most) if which == resource.RLIMIT_CPU else bound
        resource.setrlimit(which, (bound, hard))
    seccomp.drop_capabilities()
    seccomp.confine(seccomp.assemble(os.getpid()))


def _child(role: str, descriptors: list[int], limits: Any, scratch: str) -> NoReturn:
    try:
        # out of the way first: a descriptor may have the number of another one's place
        moved = [os.dup(descriptor) for descriptor in descriptors]
        with os.fdopen(os.dup(moved[-1]), "rb") as stream:
            source = stream.read().decode("utf-8", "surrogatepass")
        spare = [os.dup2(descriptor, 40 + index) for index, descriptor in enumerate(moved[:-1])]
        for place, descriptor in enumerate(spare):
            os.dup2(descriptor, place)
        os.closerange(len(spare), 4096)
        os.chdir(scratch)
        _confine(limits)
    except (OSError, ValueError) as error:
        os.write(2, f"the sandbox could not be set up: {error}\n".encode())
        os._exit(SETUP_FAILED)
    os.environ.clear()
    random.seed(0)  # the hash seed is fixed too: a verdict must not depend on luck
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = ["program.py"]
    run: Callable[[str], None] = {
        "program": inside.run_program,
        "calls": inside.run_calls,
        "candidate": inside.serve_candidate,
        "tests": inside.run_tests,
    }[role]
    os._exit(_finish(run, source))


def _finish(run: Callable[[str], None], source: str) -> int:
    """Run it as the interpreter would, down to its exit code and to what its last objects write when they go."""
    code = 0
    try:
        try:
            run(source)
        except SystemExit as error:
            code = _exit_code(error)
        except BaseException as error:  # whatever the program raises is its failure, its own KeyboardInterrupt too
            code = 1
            traceback.print_exception(error.with_traceback(_of_program(error.__traceback__)))
    except BaseException:  # what the program put in the place of standard error raises in turn
        code = code or 1
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush, _let_go, _flush):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:
            code = code or 120
            with contextlib.suppress(BaseException):
                traceback.print_exc()
    return code


def _flush() -> None:
    """Write out the standard streams, and what the program put in their place. Raises what the last failure was."""
    failed: BaseException | None = None
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed


def _let_go() -> None:
    """Drop the program's global names, so that files which it left open are written out."""
    namespace = getattr(sys.modules.get("__main__"), "__dict__", {})
    for name in list(namespace):
        if name != "__builtins__":
            namespace[name] = None


def _of_program(frames: types.TracebackType | None) -> types.TracebackType | None:
    """The part of a traceback that lies in the program, as if nothing had called it."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, inside.__file__):
        frames = frames.tb_next
    return frames


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(BaseException):
        print(error.code, file=sys.stderr or sys.__stderr__)
    return 1
