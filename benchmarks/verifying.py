"""The sandbox against a fresh interpreter for each program, and how many answers are compared in a second.

Processor time of a whole process tree is counted, children that have ended included: a sandbox does its work in
processes of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from benchmarks.contest import Turns
from benchmarks.work import Work
from upweight.rollout.sandbox import Sandbox
from upweight.verify.answers import compare

PROGRAM = "total = sum(value * value for value in range(100))\nprint(total)"
PROGRAMS = 25
"""Of one step."""

ANSWERS = 1000
"""Of one step."""


def sandbox(turns: Turns, work: Work) -> None:
    """A warm sandbox of one worker, fully isolated."""
    with Sandbox(workers=1) as pool:
        _programs(turns, lambda: pool.run(PROGRAM).stdout)


def fresh_interpreter(turns: Turns, work: Work) -> None:
    """The interpreter started bare for each program: no site packages, no isolation at all."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    _programs(turns, lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def answers(turns: Turns, work: Work) -> None:
    """Plain numbers that are equal, written otherwise; always new ones, since what was read before is kept."""
    for start in count(step=ANSWERS):
        numbers = range(start, start + ANSWERS, 2)
        assert all(compare(f"{number}", f"{2 * number}/2") == "equal" for number in numbers)
        assert all(compare(f"{number}.50", rf"\frac{{{2 * number + 1}}}{{2}}") == "equal" for number in numbers)
        if not turns.step(ANSWERS):
            return


def _programs(turns: Turns, run: Callable[[], str]) -> None:
    while True:
        before = tree_seconds(os.getpid())
        assert all(run() == "328350\n" for _ in range(PROGRAMS))
        if not turns.step(PROGRAMS, tree_seconds(os.getpid()) - before):
            return


def tree_seconds(root: int) -> float:
    """Processor time of a process, of those that it started, and of those of them that have ended."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))  # user, system, and both of ended children
    counted, found = {root}, True
    while found:
        new = {pid for pid, parent in parents.items() if parent in counted} - counted
        counted, found = counted | new, bool(new)
    return sum(ticks.get(pid, 0) for pid in counted) / os.sysconf("SC_CLK_TCK")
