"""Every module imports, so that none rots unseen."""

import importlib
import pkgutil

import pytest

import upweight

MODULES = sorted(module.name for module in pkgutil.walk_packages(upweight.__path__, "upweight."))
EXTRAS = {"upweight.app.inspect_extension": "inspect_ai"}
"""Modules that only an optional extra loads."""


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name: str) -> None:
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    assert importlib.import_module(name).__doc__, f"{name} has no docstring"
