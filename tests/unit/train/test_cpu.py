"""The compiler, which may be missing."""

import pytest

from upweight.train import cpu


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler 'no-such-compiler'"):
        assert not cpu.has_compiler()
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    assert cpu.has_compiler()
