"""What a person types becomes a recipe, or one paragraph that says what is wrong and where."""

import math
import sys
from pathlib import Path

import pytest

from upweight.app.find import find_recipe, recipe_names
from upweight.app.new import write_start
from upweight.core.errors import UserError

HEAD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_stages import Count
from upweight.app.recipe import Recipe, Step
"""
GOOD = """
def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    return Recipe("mine", Step("numbers", Count, Count.Config(to=round(10 * scale))), seed=seed)
"""


@pytest.fixture
def written(tmp_path: Path):
    """Write a recipe's file under a name that no other test uses."""
    made: list[str] = []

    def write(text: str) -> str:
        path = tmp_path / f"recipe_{tmp_path.name}_{len(made)}.py"
        made.append(path.stem)
        path.write_text(HEAD + text)
        return str(path)

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_a_function_with_options(written) -> None:
    made = find_recipe(written(GOOD), {"scale": 0.5, "seed": None})
    assert made.step("numbers").config.to == 5
    assert made.seed == 0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none(written, scale: float) -> None:
    for given in (written(GOOD), "smollm2", "nanbeige4_3b"):
        with pytest.raises(UserError, match=f"scale is {scale}: expected a number above 0"):
            find_recipe(given, {"scale": scale})


def test_a_variable(written) -> None:
    path = written('recipe = Recipe("mine", Step("numbers", Count, {"to": 3}))')
    assert find_recipe(path, {"scale": None}).name == "mine"


def test_a_variable_takes_no_options(written) -> None:
    with pytest.raises(UserError, match="--scale cannot change it"):
        find_recipe(written('recipe = Recipe("mine", Step("numbers", Count, {"to": 3}))'), {"scale": 0.5})


def test_a_function_without_the_option(written) -> None:
    with pytest.raises(UserError, match="does not take --seed"):
        find_recipe(written('def recipe(): return Recipe("m", Step("n", Count, {"to": 3}))'), {"seed": 1})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD.replace("to=round", "too=round"), r"line 8: .*Config has no field 'too': did you mean to\?"),
        (GOOD.replace("seed=seed", "sed=seed"), r"Recipe has no field 'sed': did you mean seed\?"),
        (GOOD.replace("Config(to=", "Config(\n        pause_second=1.0, to="), r"did you mean pause_seconds\?"),
        (GOOD.replace('"numbers"', '"../numbers"'), "step '../numbers'"),
        ("def recipe(:", "line 6: invalid syntax"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("x = 1", "defines no recipe"),
        ("def recipe(): return 3", "defines no recipe"),
        ("def recipe(): raise ValueError('shares sum to 0.9')", r"_0\.py, line 6: shares sum to 0.9"),
        ("def recipe(): return 1 / 0", r"_0\.py, line 6: division by zero"),
        ("open('nowhere.txt')", r"_0\.py, line 6: .*No such file or directory: 'nowhere.txt'"),
        (
            GOOD.replace("Count.Config(to=round(10 * scale))", "\n        {}"),
            r"_0\.py, line 8: step 'numbers': .* needs to",
        ),
    ],
)
def test_what_is_wrong_is_said(written, text: str, told: str) -> None:
    path = written(text)
    with pytest.raises(UserError, match=told):
        find_recipe(path, {})


def test_a_wrong_line_of_an_imported_file_is_said_to_be_there(written, tmp_path: Path) -> None:
    (tmp_path / "helper_of_a_recipe.py").write_text("x = 1\ndef broken(:\n")
    with pytest.raises(UserError, match=r"helper_of_a_recipe\.py, line 2: invalid syntax: def broken"):
        find_recipe(written("import helper_of_a_recipe"), {})


def test_a_type_error_that_is_no_misspelling_is_a_defect(written) -> None:
    with pytest.raises(TypeError):
        find_recipe(written("def recipe(): return 1 + 'a'"), {})


def test_an_unknown_recipe() -> None:
    assert "quickstart" in recipe_names()
    with pytest.raises(UserError, match=r"there is no recipe 'quikstart': did you mean quickstart\?"):
        find_recipe("quikstart", {})
    with pytest.raises(UserError, match=r"there is no file nowhere\.py"):
        find_recipe("nowhere.py", {})


def test_the_start_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "my_start.py"
    assert str(path) in write_start(path)
    made = find_recipe(str(path), {"scale": 0.1, "seed": 2})
    assert made.name == "my_start"
    assert [step.name for step in made.steps()][-1] == "report"
    assert made.identities()
    with pytest.raises(UserError, match="exists already"):
        write_start(path)
    for module in ("torch", "queue", "upweight"):
        with pytest.raises(UserError, match=f"would hide the module {module}"):
            write_start(tmp_path / f"{module}.py")
    with pytest.raises(UserError, match="Python file"):
        write_start(tmp_path / "recipe.yaml")
    sys.modules.pop("my_start")
