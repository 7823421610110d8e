"""One thread a process: the tensors of tests are tiny, and threads that wait for each other on a busy machine take
several times as long. Several processes share the tests out by files; the run of the quickstart, the longest, is first.
"""

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")


class TogetherScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """What shares a fixture stays in one process: a file, and all of tests/smoke, which share one quickstart.

    xdist's own groups are read from names that pytest no longer lets it set (pytest 9.2, xdist 3.8).
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return os.path.dirname(file) if in_smoke(file) else file


def in_smoke(path: str) -> bool:
    """Whether the file is one of those that share a quickstart."""
    return os.path.basename(os.path.dirname(path)) == "smoke"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherScheduling:
    """The scheduler of `pytest -n`."""
    return TogetherScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: not in_smoke(str(item.path)))
