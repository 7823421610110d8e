"""Resolved recipes and public names change only in a commit that shows how."""

import difflib

import pytest
from resolved import COMMAND, FOLDER, public_names, resolved

from upweight.app.find import find_recipe, recipe_names


def difference(name: str, now: str) -> list[str]:
    """The lines in which a golden file and the package differ."""
    file = FOLDER / name
    before = file.read_text() if file.exists() else ""
    return list(difflib.unified_diff(before.splitlines(), now.splitlines(), "golden", "now", lineterm="", n=1))


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_resolve_to_their_golden_text(name: str) -> None:
    changed = difference(f"recipe_{name}.txt", resolved(find_recipe(name, {})))
    assert not changed, "\n".join([f"where the change is meant, run {COMMAND} and commit what it writes", *changed])


def test_public_names() -> None:
    changed = difference("public_names.txt", public_names())
    assert not changed, "\n".join([f"where the change is meant, run {COMMAND} and commit what it writes", *changed])


def test_every_golden_recipe_is_one_of_ours() -> None:
    assert {path.name for path in FOLDER.glob("recipe_*.txt")} == {f"recipe_{name}.txt" for name in recipe_names()}
