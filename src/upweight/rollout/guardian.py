"""Runs a command for as long as the standard input is open, and ends it with every process that it has started.

    python guardian.py COMMAND...

Whoever starts this holds the other end of a pipe. Where they are killed, the pipe closes all the same: so a server does
not outlive the run that it belongs to, with the GPU's memory in its hands. Standard library only. Exits with the
command's own code, 128 + n where signal n ended it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 30.0
"""For a command to end by itself once it was asked to."""


def main() -> None:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    code = process.wait()
    _kill(process)  # what it has left behind
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_input(process: "subprocess.Popen[bytes]") -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not by its buffer, whose lock would be held when this process ends
        continue
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
