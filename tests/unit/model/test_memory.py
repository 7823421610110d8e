"""Memory that stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from upweight.model.memory import keep_freed_memory

if {kept}:
    keep_freed_memory()
for _ in range(8):  # the heap settles after a few rounds: an aligned block does not always fit where one was freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 24) for _ in range(4)]  # of 64 MB each: more than glibc would ever keep by itself
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    # in a process of its own: what else one has allocated decides where a block comes from
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (True, False)
    )
    assert kept < 1000
    # new pages: 4 x 2^26 / 4096 = 65,536, or 4 x 2^26 / 2^21 = 128 where the system gives huge ones
    assert given_back > kept


HELD = """
import os
from pathlib import Path
import torch
from upweight.model.memory import give_back_freed_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

keep_freed_memory()
parts = [torch.ones(1 << 20) for _ in range(100)]  # 4 MB each
wall = torch.ones(1 << 20)  # above them: the end of the heap stays in use
del parts
before = resident()
give_back_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_goes_back_when_asked_for() -> None:
    given = subprocess.run([sys.executable, "-c", HELD], capture_output=True, check=True).stdout
    assert int(given) > 350  # of 400 MB
