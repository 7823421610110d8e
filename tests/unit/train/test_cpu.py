"""What is done for speed on a CPU: memory that stays, and a compiler that may be missing."""

import platform
import resource

import pytest
import torch

from upweight.train import cpu


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    cpu.keep_freed_memory()
    torch.ones(1 << 24)  # 64 MB: more than glibc would ever keep by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1000  # new pages would be 2^26 / 4096 = 16,384


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler 'no-such-compiler'"):
        assert not cpu.has_compiler()
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    assert cpu.has_compiler()
