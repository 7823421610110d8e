"""The sandbox for honest programs: what they see, how their end is told, and the pool. Hostile ones: contract 11."""

import os
import platform
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from upweight.core.errors import IsolationUnavailable
from upweight.rollout import seccomp
from upweight.rollout.inside import DEEPEST, NotPlain, pack, unpack
from upweight.rollout.sandbox import Sandbox, SandboxLimits, run_python


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(cpu_seconds=2.0, wall_seconds=3.0), workers=2) as pool:
        try:
            pool.run("0")
        except IsolationUnavailable as error:
            pytest.skip(f"THE SANDBOX IS NOT TESTED HERE: {error}")
        yield pool


def test_output_input_and_exit_code(sandbox: Sandbox) -> None:
    done = sandbox.run("import sys; print(input() + '!'); print('é', file=sys.stderr)", stdin="grüß dich\nmore\n")
    assert (done.stdout, done.stderr, done.exit_code, done.ok) == ("grüß dich!\n", "é\n", 0, True)
    assert done.isolated
    assert 0 < done.wall_seconds < 3
    assert done.memory_bytes > 1 << 20


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("import os; os._exit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("def f(:", 1, "SyntaxError: invalid syntax\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
        ("import os; os.abort()", -6, ""),
    ],
)
def test_every_end_is_told(sandbox: Sandbox, code: str, exit_code: int, stderr: str) -> None:
    done = sandbox.run(code)
    assert done.exit_code == exit_code
    assert done.stderr.endswith(stderr)
    assert done.ok == (exit_code == 0)


def test_half_of_a_surrogate_pair_is_the_programs_own_error(sandbox: Sandbox) -> None:
    # the arguments of a call are JSON, which can hold one
    done = sandbox.run('print("\ud83d")')
    assert (done.exit_code, done.stdout) == (1, "")
    assert "UnicodeEncodeError" in done.stderr
    assert b'"failure": ""' not in sandbox.run_tests('x = "\ud83d"', ["assert x"]).results
    assert sandbox.run("import sys; print(ascii(sys.stdin.buffer.read()))", stdin="\udcff").stdout == "b'\\xff'\n"


def test_tracebacks_show_the_program_alone(sandbox: Sandbox) -> None:
    done = sandbox.run("def f():\n    return {}['key']\nf()\n")
    assert done.stderr == (
        "Traceback (most recent call last):\n"
        '  File "program.py", line 3, in <module>\n'
        '  File "program.py", line 2, in f\n'
        "KeyError: 'key'\n"
    )


def test_an_ordinary_program_finds_what_it_needs(sandbox: Sandbox) -> None:
    code = """
import asyncio, atexit, concurrent.futures, dataclasses, json, pickle, re, tempfile, threading
from fractions import Fraction

@dataclasses.dataclass
class Point:
    x: int

atexit.register(print, "at exit")
if __name__ == "__main__":
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("text")
        file.seek(0)
        print(file.read())
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        print(sum(pool.map(abs, [-1, 2])))
    async def answer():
        await asyncio.sleep(0.001)
        return 42
    print(asyncio.run(answer()))
    print(pickle.loads(pickle.dumps(Point(3))), Fraction(1, 3))
"""
    done = sandbox.run(code)
    assert done.stdout == "text\n3\n42\nPoint(x=3) 1/3\nat exit\n", done.stderr


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"),
    [
        ("print(1); exit()", "1\n", ""),
        ("print(1); quit(0)", "1\n", ""),
        ("import sys, io\nprint(1)\nold = sys.stdout\nsys.stdout = io.StringIO()\nprint(2)", "1\n", ""),
        ("import sys\nprint(1)\nsys.__stdout__.write('2')\nprint(3)", "1\n23\n", ""),
        ("import sys\nprint(1)\nsys.stdout.close()", "1\n", ""),
        ("out = open(1, 'w')\nout.write('1')", "1", ""),
        ("class Last:\n    def __del__(self): print('gone')\nlast = Last()", "gone\n", ""),
        ("import sys\nsys.stderr.write('no end of line')", "", "no end of line"),
    ],
)
def test_a_program_ends_as_the_interpreter_would_end_it(sandbox: Sandbox, code: str, stdout: str, stderr: str) -> None:
    done = sandbox.run(code)
    assert (done.stdout, done.stderr, done.exit_code) == (stdout, stderr, 0)


def test_a_program_that_breaks_its_standard_error_fails_without_a_word_of_the_server(sandbox: Sandbox) -> None:
    broken = "class No:\n    def __str__(self): raise ValueError\n    write = __str__\nimport sys\n"
    for code in ("sys.stderr = No()\n1 / 0", "sys.exit(No())", "sys.stderr = No()\nsys.exit('no')"):
        done = sandbox.run(broken + code)
        assert (done.exit_code, done.stdout, done.stderr) == (1, "", ""), done


def test_a_program_that_uses_up_its_processor_time_is_told_apart_from_a_wrong_one(sandbox: Sandbox) -> None:
    deaf = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    for code in ("while True: pass", f"{deaf}while True: pass"):
        done = sandbox.run(code, limits=SandboxLimits(cpu_seconds=1.0, wall_seconds=60.0))
        assert (done.timed_out, done.ok) == (True, False), done
        assert 0.9 < done.cpu_seconds < 2.5


def test_a_program_cannot_shut_the_next_one_out(sandbox: Sandbox) -> None:
    with Sandbox(workers=1) as pool:
        pool.run("import os; os.chmod('/tmp', 0)")
        (server,) = pool._idle
        assert pool.run("import os; print(os.listdir('/tmp'))").stdout == "[]\n"
        assert pool._idle == [server]


def test_runs_are_reproducible(sandbox: Sandbox) -> None:
    code = "import random; print(random.random(), hash('text'), list({'a', 'b', 'c'}))"
    assert sandbox.run(code).stdout == sandbox.run(code).stdout != ""


def test_limits_are_those_that_were_given(sandbox: Sandbox) -> None:
    roomy = SandboxLimits(memory_bytes=512 << 20, disk_bytes=4 << 20, output_bytes=4 << 20)
    assert sandbox.run("len(bytes(300 << 20))", limits=roomy).ok
    assert not sandbox.run("len(bytes(300 << 20))").ok
    assert sandbox.run("open('file', 'wb').write(bytes(3 << 20))", limits=roomy).ok
    small = SandboxLimits(disk_bytes=1 << 20)
    assert "File too large" in sandbox.run("open('file', 'wb').write(bytes(3 << 20))", limits=small).stderr
    assert len(sandbox.run("print('x' * (3 << 20))", limits=roomy).stdout) == (3 << 20) + 1
    with pytest.raises(ValueError, match="cpu_seconds is 0"):
        SandboxLimits(cpu_seconds=0.0)


def test_many_at_once_in_order_and_from_several_threads(sandbox: Sandbox) -> None:
    outputs = sandbox.map(lambda index: sandbox.run(f"print({index})").stdout, list(range(30)))
    assert outputs == [f"{index}\n" for index in range(30)]
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(sandbox.run("print('here')").stdout)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["here\n"] * 8
    # the servers that those threads started outlive them
    assert sandbox.run("print('still')").stdout == "still\n"


def test_a_forked_process_has_servers_of_its_own(sandbox: Sandbox) -> None:
    sandbox.run("0")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, sandbox.run("print('child')").stdout.encode())
        os._exit(0)
    os.close(write)
    assert sandbox.run("print('parent')").stdout == "parent\n"
    os.waitpid(pid, 0)
    with os.fdopen(read) as stream:
        assert stream.read() == "child\n"


def test_a_server_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    sandbox.run("0")
    for enclosure in sandbox._idle:
        enclosure._process.kill()
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_server_that_ends_before_it_hears_of_the_program_is_replaced(sandbox: Sandbox) -> None:
    with Sandbox(workers=1) as pool:
        pool.run("0")
        (enclosure,) = pool._idle
        enclosure.control.shutdown(socket.SHUT_WR)
        enclosure.alive = lambda: True  # type: ignore[method-assign] - it was, when it was asked
        assert pool.run("print(1)").stdout == "1\n"


def test_closing_leaves_no_process_behind() -> None:
    with Sandbox(workers=1) as pool:
        try:
            pool.run("0")
        except IsolationUnavailable as error:
            pytest.skip(f"THE SANDBOX IS NOT TESTED HERE: {error}")
        process = pool._idle[0]._process
    assert process.poll() is not None


def test_the_shared_pool(sandbox: Sandbox) -> None:
    assert run_python("print(input())", stdin="x").stdout == "x\n"


VALUES = [
    None,
    True,
    0,
    -(10**40),
    1.5,
    float("inf"),
    2 + 3j,
    "text \ud800",
    b"\x00\xff",
    [1, [2, (3, "4")]],
    {1: {"a": {2, 3}}, (1, 2): frozenset({4})},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_were(value: object) -> None:
    back = unpack(pack(value))
    assert back == value
    assert type(back) is type(value)


def test_what_is_no_plain_value_does_not_travel() -> None:
    with pytest.raises(NotPlain, match="function"):
        pack(lambda: 0)
    deep: list[object] = []
    for _ in range(DEEPEST + 2):
        deep = [deep]
    with pytest.raises(NotPlain, match="nested deeper"):
        pack(deep)
    for forged in (
        {"x": 1},
        {"i": 5},
        {"l": 3},
        {"s": [{"l": []}]},
        {"d": [[1]]},
        7,
        {"i": "0x1", "f": "1"},
        {"c": []},
    ):
        with pytest.raises(ValueError, match=r"packed value|hexadecimal|expected"):
            unpack(forged)


def interpret(program: bytes, data: bytes) -> int:
    """What the kernel's filter machine returns for one call: load, two kinds of jumps, return."""
    accumulator = place = 0
    while True:
        code, when_true, when_false, constant = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, constant)
        elif code == 0x06:
            return int(constant)
        else:
            holds = accumulator == constant if code == 0x15 else bool(accumulator & constant)
            place += when_true if holds else when_false


ALLOW, KILL = 0x7FFF0000, 0x80000000


def refused(errno: int) -> int:
    return 0x00050000 | errno


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_allows_what_is_listed_and_nothing_else(machine: str, architecture: int) -> None:
    program = seccomp.assemble(1234, machine)
    table, special = seccomp._TABLES[machine], seccomp._CONDITIONAL[machine]

    def verdict(number: int, *arguments: int, architecture: int = architecture) -> int:
        padded = (*arguments, *[0] * (6 - len(arguments)))
        return interpret(program, struct.pack("=IIQ6Q", number, architecture, 0, *padded))

    for number in range(600):
        if number in table.values():
            assert verdict(number, 1, 2, 3) == ALLOW
        elif number not in special.values():
            assert verdict(number) == refused(1)
    assert len(set(table.values()) | set(special.values())) == len(table) + len(special)
    assert verdict(table["read"], architecture=0x40000003) == KILL  # the 32-bit calls of the same processor
    assert verdict(special["clone"], 0x3D0F00) == ALLOW  # a thread
    assert verdict(special["clone"], 0x11) == refused(1)  # a process
    assert verdict(special["clone3"], 0x10000) == refused(38)
    for name in ("kill", "tgkill"):
        assert verdict(special[name], 1234, 9) == ALLOW
        assert verdict(special[name], 1, 9) == refused(1)
        assert verdict(special[name], 0xFFFFFFFF, 9) == refused(1)
    assert verdict(special["ioctl"], 1, 0x5451) == ALLOW
    assert verdict(special["ioctl"], 1, 0x541B) == ALLOW
    assert verdict(special["ioctl"], 1, 0x5412) == refused(25)  # writing to a terminal
    for command in (0, 1, 2, 3, 4, 6, 1030):  # duplicate, close on exec, status, locks
        assert verdict(special["fcntl"], 5, command) == ALLOW
    for command in (8, 10, 15, 1024, 1026, 1031):  # who is signalled and by what, leases, a pipe's size
        assert verdict(special["fcntl"], 5, command) == refused(1)
    assert verdict(special["sendto"], 5, 4096, 1, 0, 0, 0) == ALLOW
    assert verdict(special["sendto"], 5, 4096, 1, 0, 4096, 110) == refused(1)
    assert verdict(special["sendto"], 5, 4096, 1, 0, 1 << 40, 110) == refused(1)
    assert verdict(special["prlimit64"], 0, 7, 0, 99) == ALLOW
    assert verdict(special["prlimit64"], 0, 7, 4096) == refused(1)
    assert verdict(special["prlimit64"], 0, 7, 1 << 40) == refused(1)
    assert verdict(special["socketpair"], 1, 1, 0) == ALLOW
    assert verdict(special["socketpair"], 2, 1, 0) == refused(1)


@pytest.mark.parametrize(
    ("machine", "architecture", "sockets"),
    [("x86_64", 0xC000003E, {41, 53, 425}), ("aarch64", 0xC00000B7, {198, 199, 425})],
)
def test_a_filter_that_refuses_sockets_alone(machine: str, architecture: int, sockets: set[int]) -> None:
    program = seccomp.without_sockets(machine)

    def verdict(number: int, architecture: int = architecture) -> int:
        return interpret(program, struct.pack("=IIQ6Q", number, architecture, 0, *[0] * 6))

    assert {number for number in range(600) if verdict(number) == refused(1)} == sockets
    assert verdict(0) == ALLOW
    assert verdict(0x40000000 + 41) == refused(1)  # the x32 calls
    assert verdict(0, 0x40000003) == KILL


def test_this_machine_is_tabled() -> None:
    assert (platform.machine() in ("x86_64", "aarch64")) == seccomp.SUPPORTED
