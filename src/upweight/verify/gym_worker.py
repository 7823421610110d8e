"""The process in which reasoning-gym makes problems and judges answers: one JSON request a line in, one answer out.

A request names a family and its configuration, and either the index of a problem to make or an entry with the answer
to judge. Its limits are the kernel's: memory, and processor time renewed for each request. It writes no file.
"""

import functools
import json
import logging
import math
import resource
import sys
import time
from typing import Any

from upweight.rollout import seccomp
from upweight.rollout.inside import pack, unpack

MEMORY_BYTES = 4 * 2**30
SCRATCH_BYTES = 1 << 20
OPENING_SECONDS = 60
"""Processor time to open a family; some read a dictionary first."""


@functools.lru_cache(maxsize=256)
def _dataset(family: str, config: str) -> Any:
    from reasoning_gym.factory import create_dataset  # in the worker alone; the package is an optional extra

    return create_dataset(family, **unpack(json.loads(config)))


@functools.lru_cache(maxsize=256)  # each is asked for twice: for itself, and for its answer to the one before it
def _made(family: str, config: str, index: int) -> dict[str, Any]:
    entry = _dataset(family, config)[index]
    answer = entry["answer"]
    return {
        "question": str(entry["question"]),
        "answer": None if answer is None else str(answer),
        "entry": pack(dict(entry)),
    }


def _answer(request: Any) -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    if request["family"] not in DATASETS:
        return {"unknown": sorted(DATASETS)}
    try:
        _allow(OPENING_SECONDS)
        named = request["family"], json.dumps(request["config"])
        dataset = _dataset(*named)
        _allow(request["seconds"])
        if "index" in request:
            return _made(*named, request["index"])
        return {"score": float(dataset.score_answer(request["answer"], unpack(request["entry"])))}
    except Exception as error:  # noqa: BLE001 - another package's verifier: whatever it raises is told
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _allow(seconds: float) -> None:
    """From now on, so much processor time; the kernel ends the process after that."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, hard))


def main() -> None:
    """Serve until standard input ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import reasoning_gym  # noqa: F401 - takes seconds, which must not count towards the first request

    resource.setrlimit(resource.RLIMIT_FSIZE, (SCRATCH_BYTES, SCRATCH_BYTES))
    if seccomp.SUPPORTED:
        seccomp.confine(seccomp.without_sockets())
    replies = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=replies, flush=True)
