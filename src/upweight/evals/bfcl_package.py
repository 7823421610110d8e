"""The package bfcl-eval, read without what it does not need here: its cases, prompts, checkers and simulated services.

The package pins thirty others (clients of every provider, numpy 1.26), so it is installed alone: `pip install --no-deps
bfcl-eval`. Its checker asks one table of all providers' models whether names of functions had their dots replaced;
here they never have, and a table that says so stands in while the checker is imported.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from upweight.core.errors import UserError
from upweight.evals.rows import package_directory, read_rows

PACKAGE = "bfcl_eval"
WANTED = "bfcl wants the package bfcl-eval, which holds its cases and checkers: pip install --no-deps bfcl-eval"
_MODELS = f"{PACKAGE}.constants.model_config"
_UTILITIES = "eval_checker.multi_turn_eval.multi_turn_utils"


class _EveryModel(dict[str, Any]):
    """A table of models in which each is as ours are: functions keep their dots."""

    def __missing__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(underscore_to_dot=False)


@contextmanager
def _table_of_models() -> Iterator[None]:
    held = sys.modules.get(_MODELS)
    stand_in = ModuleType(_MODELS)
    stand_in.MODEL_CONFIG_MAPPING = _EveryModel()  # type: ignore[attr-defined]
    sys.modules[_MODELS] = stand_in
    try:
        yield
    finally:
        if held is None:
            del sys.modules[_MODELS]
        else:
            sys.modules[_MODELS] = held


@cache
def part_of(name: str) -> Any:
    """A module of the package, by its name below it. Raises UserError where it, or what it needs, is missing."""
    if package_directory(PACKAGE) is None:
        raise UserError(WANTED)
    try:
        with _table_of_models():
            return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise UserError(f"bfcl-eval cannot be used: {error}. Install what it names, or another version") from error


@cache
def documents(file: str) -> tuple[Mapping[str, Any], ...]:
    """The functions of one simulated service; read once, so not to be changed."""
    return tuple(lines(f"multi_turn_func_doc/{file}"))


def lines(file: str) -> list[dict[str, Any]]:
    """The rows of a file of the package's data."""
    directory = package_directory(PACKAGE)
    if directory is None:
        raise UserError(WANTED)
    path = Path(directory) / "data" / file
    if not path.exists():
        raise UserError(f"bfcl-eval has no {file}: this version of the package is not BFCL-V4; install bfcl-eval 2026")
    return [dict(row) for row in read_rows(path)]


def system_prompt(functions: Sequence[Mapping[str, Any]]) -> str:
    """The leaderboard's default prompt (its "classic" style) for models that are asked in text."""
    prompts = part_of("constants.default_prompts")
    style = prompts.PROMPT_STYLE_TEMPLATES["classic"]
    form = style["tool_call_no_tag"].format(output_format=prompts.OUTPUT_FORMAT_MAPPING["python"], param_types="")
    tools = style["available_tools"].format(format="json", functions=json.dumps(list(functions), indent=4))
    return str(
        prompts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
            persona=style["persona"],
            task=style["task"],
            tool_call_format=form,
            multiturn_behavior=style["multiturn_behavior"],
            available_tools=tools,
        )
    )


def more_functions(functions: Sequence[Mapping[str, Any]]) -> str:
    """What the user says when functions that were held back become known."""
    template = part_of("constants.default_prompts").DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
    return str(template.format(functions=list(functions)))


def callable_here(entry: Mapping[str, Any], call: str) -> bool:
    """Whether a call, as `written` makes them, is of a function of the services that the case involves."""
    return _called(call) in entry["callable"]


def _called(call: str) -> str:
    return call.partition("(")[0]


def _unknown(call: str) -> str:
    return f"name {_called(call)!r} is not defined"


class Services:
    """The simulated services of one episode. Their state lives in the package's module until `close`.

    Args:
        entry: the case: its id, initial configuration, the classes involved and the names of their functions.
        owner: a name that no other episode has.
    """

    def __init__(self, entry: Mapping[str, Any], owner: str) -> None:
        self._utilities = part_of(_UTILITIES)
        self._entry = entry
        self.owner = owner

    def call(self, calls: Sequence[str]) -> list[str]:
        """The results of calls whose arguments are literals, as `written` makes them: nothing else may come here.

        The package evaluates them, so what names no function of the services (`exec`, say) is answered with an error.
        """
        known = [call for call in calls if callable_here(self._entry, call)]
        done, _ = self._utilities.execute_multi_turn_func_call(
            func_call_list=known,
            initial_config=self._entry["initial_config"],
            involved_classes=self._entry["involved_classes"],
            model_name=self.owner,
            test_entry_id=self._entry["id"],
            long_context="long_context" in self._entry["id"],
        )
        results = iter(done)
        return [
            str(next(results)) if callable_here(self._entry, call) else f"Error during execution: {_unknown(call)}"
            for call in calls
        ]

    def close(self) -> None:
        """Forget the state, and that of the checker's own run of it."""
        held = vars(self._utilities)
        for name in [name for name in held if name.startswith(f"{self.owner}_")]:
            del held[name]
