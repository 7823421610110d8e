"""One run of the quickstart at a reduced size, shared by the tests of this folder."""

from pathlib import Path

import pytest
from command import SCALE, upweight


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `upweight run quickstart` was called: its artifacts lie in runs/quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    made = upweight("run", "quickstart", "--scale", str(SCALE), timeout_seconds=850, folder=folder)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return folder
