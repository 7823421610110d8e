"""From what a person types to a recipe: a name in upweight.recipes, or a Python file of one's own.

Either is a module with a function `recipe(...) -> Recipe`, or with a variable `recipe` that is one. The claims of
upweight.recipes.claims are recipes too, under names of their own.
"""

import ast
import importlib
import importlib.util
import inspect
import linecache
import math
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from upweight.app.recipe import Recipe, suggestion
from upweight.core.errors import UserError

PACKAGE = "upweight.recipes"
CLAIMS = "upweight.recipes.claims"
UNEXPECTED = re.compile(r"got an unexpected keyword argument '(?P<field>\w+)'")


def recipe_names(package: str = PACKAGE) -> list[str]:
    """The recipes that come with the package, or those of another package of recipes."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in modules if not module.ispkg and not module.name.startswith("_"))


def find_recipe(given: str, options: Mapping[str, Any], package: str = PACKAGE) -> Recipe:
    """The recipe that `given` names: a name of ours, or a path that ends in .py.

    Args:
        options: arguments of the recipe's function; those that are None are left to its defaults.
        package: where the names are looked up.

    Raises UserError where there is none of that name, where the scale is none, where the file does not run, where it
    has no `recipe`, and where a field of a configuration is misspelt.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if not 0 < asked.get("scale", 1.0) < math.inf:
        raise UserError(f"scale is {asked['scale']}: expected a number above 0; 1 is the recipe as published")
    try:
        module = find_module(given, package)
        made = getattr(module, "recipe", None)
        if callable(made):
            made = made(**_accepted(made, asked, given))
        elif asked and isinstance(made, Recipe):
            raise UserError(
                f"{given}: `recipe` is a variable, so {_flags(asked)} cannot change it. Make it a function: "
                "def recipe(scale: float = 1.0, seed: int = 0) -> Recipe"
            )
    except TypeError as error:
        raise _misspelt(error, given) from None
    except UserError as error:
        line = _own_line(error, given)
        if line is not None:
            error.args = (f"{given}{_at(line)}: {error}",)
        raise
    except (ValueError, ArithmeticError, OSError) as error:
        # a value that a record, a timeline or a configuration refuses, a scale of 0, a file that is not there
        line = _own_line(error, given)
        if line is None and isinstance(error, OSError):
            raise
        raise UserError(f"{given}{_at(line)}: {error}") from error
    if not isinstance(made, Recipe):
        raise UserError(
            f"{given} defines no recipe: it needs a function recipe(scale: float = 1.0, seed: int = 0) that returns an "
            "upweight.app.recipe.Recipe (`upweight new my_recipe.py` writes an example)"
        )
    return made


def find_module(given: str, package: str = PACKAGE) -> ModuleType:
    """The module that holds the recipe `given`."""
    return _own_file(Path(given)) if given.endswith(".py") else _ours(given, package)


def _ours(name: str, package: str) -> ModuleType:
    known = recipe_names(package)
    if name not in known:
        kind = "claim" if package == CLAIMS else "recipe"
        hint = f", or give the path of a file of your own ({name}.py)"
        raise UserError(f"there is no {kind} {name!r}{suggestion(name, known)}{hint}")
    return importlib.import_module(f"{package}.{name}")


def _own_file(path: Path) -> ModuleType:
    """Run a person's file as a module. Its own directory can be imported from, as with `python my_recipe.py`."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: `upweight new {path}` writes a commented start")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and loaded.__file__ is not None and Path(loaded.__file__).resolve() == path.resolve():
        return loaded
    if loaded is not None:
        raise UserError(f"{path}: a module named {path.stem} is loaded already; give the file another name")
    specification = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if specification is None or specification.loader is None:
        raise UserError(f"{path} cannot be loaded as a Python module: is it a Python file?")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses look their module up
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        specification.loader.exec_module(module)
    except SyntaxError as error:  # of this file, or of one that it imports
        file = path if error.filename in (None, str(path.resolve())) else error.filename
        shown = f": {error.text.strip()}" if error.text else ""
        raise UserError(f"{file}{_at(error.lineno)}: {error.msg}{shown}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: {error}. Install it, or correct the import") from None
    except ImportError as error:
        raise UserError(f"{path}: {error}. Correct the import") from None
    return module


def _accepted(function: Any, asked: Mapping[str, Any], given: str) -> Mapping[str, Any]:
    """`asked`, where the recipe's function takes it all."""
    parameters = inspect.signature(function).parameters
    refused = [name for name in asked if name not in parameters]
    if refused:
        raise UserError(
            f"{given}: its function recipe({', '.join(parameters)}) does not take {_flags(refused)}: "
            "leave the option out, or add the parameter"
        )
    return asked


def _flags(names: Mapping[str, Any] | list[str]) -> str:
    return " and ".join(f"--{name}" for name in names)


def _misspelt(error: TypeError, given: str) -> Exception:
    """The UserError that a misspelt field deserves; `error` itself where it is something else."""
    match = UNEXPECTED.search(str(error))
    if match is None:
        return error
    for trace in reversed(list(_traces(error))):
        called = _called(trace, match["field"])
        if called is not None:
            line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
            where = f"{given}, line {trace.tb_lineno}" if given.endswith(".py") else f"recipe {given}"
            hint = suggestion(match["field"], list(inspect.signature(called).parameters))
            return UserError(f"{where}: {called.__qualname__} has no field {match['field']!r}{hint} (in: {line})")
    return error


def _own_line(error: BaseException, given: str) -> int | None:
    """The line of a person's own file at which `error` came about; None where it was elsewhere."""
    own = str(Path(given).resolve())
    lines = [trace.tb_lineno for trace in _traces(error) if trace.tb_frame.f_code.co_filename == own]
    return lines[-1] if lines else None


def _at(line: int | None) -> str:
    return "" if line is None else f", line {line}"


def _traces(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _called(trace: TracebackType, field: str) -> Any:
    """The class or function that this frame calls with the argument `field`, by the call's place in the source."""
    frame = trace.tb_frame
    positions = list(frame.f_code.co_positions())[trace.tb_lasti // 2]
    first, last, start, end = positions
    if first is None or last is None or start is None or end is None:
        return None
    lines = [linecache.getline(frame.f_code.co_filename, number) for number in range(first, last + 1)]
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:end]
    encoded[0] = encoded[0][start:]
    try:
        call = ast.parse(b"".join(encoded).decode().strip(), mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call) or field not in [argument.arg for argument in call.keywords]:
        return None
    found: Any = None
    for depth, name in enumerate(ast.unparse(call.func).split(".")):
        found = {**frame.f_globals, **frame.f_locals}.get(name) if depth == 0 else getattr(found, name, None)
    return found
