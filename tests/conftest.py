"""One thread a process: the tensors of tests are tiny, and threads that wait for each other on a busy machine take
several times as long. Several processes share the tests out by files; the run of the quickstart, the longest, is first.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture stays in one process: a file, and all of tests/smoke, which share one quickstart."""

    def in_smoke(item: pytest.Item) -> bool:
        return item.path.parent.name == "smoke"

    items.sort(key=lambda item: not in_smoke(item))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("smoke" if in_smoke(item) else item.path.stem))
