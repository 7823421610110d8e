"""Processes that judge: one request after another, ended when late, replaced when they are gone."""

import os
import sys
from collections.abc import Iterator

import pytest

from upweight.verify.workers import WorkerDied, Workers

ECHO = """
import json, sys, time
print('"ready"', flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "hang":
        time.sleep(600)
    if asked == "die":
        sys.exit(3)
    print(json.dumps(asked), flush=True)
"""


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(lambda: ([sys.executable, "-S", "-c", ECHO], dict(os.environ)))
    yield made
    made.close()


def test_a_worker_serves_on_and_one_that_dies_under_a_request_is_told_of(workers: Workers) -> None:
    assert [workers.ask(asked, 5) for asked in (1, "two", [3])] == [1, "two", [3]]
    assert len(workers._idle) == 1
    with pytest.raises(WorkerDied):
        workers.ask("die", 5)
    with pytest.raises(WorkerDied):
        workers.ask("hang", 0.01)
    assert workers.ask("again", 5) == "again"


def test_one_that_ended_while_it_waited_is_replaced_and_no_verdict_is_lost(workers: Workers) -> None:
    assert workers.ask(1, 5) == 1
    (idle,) = workers._idle
    idle.process.kill()
    idle.process.wait()
    assert workers.ask(2, 5) == 2
    assert idle not in workers._idle
