"""Equality of mathematical expressions by math-verify, in processes that can be killed.

math-verify refuses to run in threads, and an expression such as 9^{9^{9^9}} keeps sympy busy for ever, so every
comparison runs in a worker process with limits on processor time and memory. Workers start when first needed, serve
many comparisons, and are replaced when they die.
"""

import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

from upweight.verify.workers import WorkerDied, Workers

Outcome = Literal["equal", "different", "timed out"]

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_POWER = re.compile(r"\^(-?[0-9]{2,})")
# -P: the room's own file names must not shadow modules of others
_WORKERS = Workers(lambda: ([sys.executable, "-P", str(_WORKER)], {**os.environ, "OMP_NUM_THREADS": "1"}))


@lru_cache(maxsize=16384)
def compare_expressions(candidate: str, reference: str, cpu_seconds: int) -> Outcome:
    """Whether two LaTeX or plain expressions mean the same; "timed out" where that took more than `cpu_seconds` of
    processor time or 4 GiB. Outcomes are remembered, so a group that repeats a hanging answer waits for it once."""
    try:
        equal = _WORKERS.ask([_as_latex(candidate), _as_latex(reference), cpu_seconds], cpu_seconds)
    except WorkerDied:
        return "timed out"
    return "equal" if equal is True else "different"


def _as_latex(text: str) -> str:
    text = _PI.sub(r"\\pi", text.replace("**", "^"))
    return _POWER.sub(r"^{\1}", text)
