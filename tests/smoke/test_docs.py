"""Every upweight command that the README or a page of docs shows runs, on the artifacts of a small quickstart."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command import SCALE, upweight

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SIZED = ("run", "plan", "show", "report")
"""Commands that take --scale: without it they would ask for the quickstart at full size."""


def shown() -> Iterator[list[str]]:
    """The commands in fenced blocks, each once, in the order of the pages; installing is what CI itself does."""
    seen = set()
    for page in PAGES:
        for block in FENCED.findall(page.read_text()):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["upweight"] and tuple(words) not in seen:
                    seen.add(tuple(words))
                    yield words[1:]


def sized(words: list[str]) -> list[str]:
    """The same command on the small quickstart."""
    if words[0] not in SIZED or not ("quickstart" in words or "my_recipe.py" in words):
        return words
    kept = [word for word in words if word not in ("--scale", "--root")]
    for flag in ("--scale", "--root"):
        if flag in words:
            kept.remove(words[words.index(flag) + 1])
    return [*kept, "--scale", str(SCALE)]


@pytest.mark.timeout(900)
def test_the_commands_of_the_docs_run(quickstart_folder: Path) -> None:
    commands = list(shown())
    assert {words[0] for words in commands} >= {"run", "plan", "show", "chat", "serve", "new"}
    for words in commands:
        if words[0] == "serve":
            serve(words, quickstart_folder)
            continue
        done = upweight(
            *sized(words), timeout_seconds=400, folder=quickstart_folder, typed="Mia has 3 pens. How many pens?\n"
        )
        assert done.returncode == 0, f"upweight {shlex.join(words)}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        assert done.stdout.strip(), f"upweight {shlex.join(words)} printed nothing"


def serve(words: list[str], folder: Path) -> None:
    """Start the server, ask it for its models, stop it as Ctrl-C does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "upweight.cli", *words, "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, server.stdout.read() if server.stdout else ""
            try:
                found = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).json()
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the server did not answer within 90 s"
                time.sleep(0.3)
        assert len(found["data"]) == 1
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
    finally:
        server.kill()
