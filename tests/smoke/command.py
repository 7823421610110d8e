"""The command line as a user starts it, and the size of the quickstart that these tests run."""

import os
import subprocess
import sys
from pathlib import Path

SCALE = 0.05


def upweight(
    *arguments: str, timeout_seconds: float, folder: Path | None = None, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """`upweight ARGUMENTS` in `folder`, with `typed` on its standard input."""
    command = [sys.executable, "-m", "upweight.cli", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_seconds, env=environment, cwd=folder, input=typed
    )
