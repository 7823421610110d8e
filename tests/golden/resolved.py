"""Resolved recipes and public names as text: what a change really changes shows in its diff.

Written anew, from the package as it is, by: python tests/golden/resolved.py
"""

import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from upweight.app.find import find_recipe, recipe_names
from upweight.app.recipe import Recipe

FOLDER = Path(__file__).parent
COMMAND = "python tests/golden/resolved.py"
LONGEST = 90
ROOMS = (
    "upweight.core",
    "upweight.objectives",
    "upweight.app.recipe",
    "upweight.curate.overlap",
    "upweight.curate.readers",
    "upweight.curate.tagger",
    "upweight.evals.estimators",
    "upweight.model.config",
    "upweight.model.language_model",
    "upweight.model.weights",
    "upweight.rollout.sandbox",
    "upweight.store.shards",
    "upweight.text.chat",
    "upweight.text.conversations",
    "upweight.text.tokenizer",
    "upweight.train.checkpoint",
    "upweight.train.loader",
    "upweight.train.optimizer",
    "upweight.train.timeline",
    "upweight.train.trainer",
    "upweight.verify.answers",
)
"""What outside code imports; whoever changes these changes somebody's notebook."""


def resolved(recipe: Recipe) -> str:
    """Every step with its stage, its inputs, and every field of its configuration on a line of its own."""
    lines = [f"recipe {recipe.name}, seed {recipe.seed}"]
    for name, identity in recipe.identities().items():
        step = recipe.step(name)
        lines += ["", f"[{name}] {step.stage_name}"]
        lines += [f"    {key} <- {source.name}" for key, source in sorted(step.inputs.items())]
        lines += [f"    {path} = {value}" for path, value in _leaves(identity["config"])]
    return "\n".join(lines) + "\n"


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        text = json.dumps(value, ensure_ascii=False)
        if len(text) > LONGEST:  # a template: its beginning, and a digest of all of it
            text = f"{text[:60]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
        yield path, text


def public_names() -> str:
    """The functions and classes that others call, by module, with the names that they take."""
    lines = []
    for name in sorted(_public_modules()):
        module = importlib.import_module(name)
        for item, value in sorted(vars(module).items()):
            public = (inspect.isclass(value) or inspect.isfunction(value)) and not item.startswith("_")
            if public and value.__module__ == name:
                lines.append(f"{name}.{item}({', '.join(_taken(value))})")
    return "\n".join(lines) + "\n"


def _public_modules() -> Iterator[str]:
    for room in ROOMS:
        package = importlib.import_module(room)
        if hasattr(package, "__path__"):
            yield from (module.name for module in pkgutil.iter_modules(package.__path__, f"{room}."))
        else:
            yield room


def _taken(value: object) -> list[str]:
    try:
        return list(inspect.signature(value).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # exceptions and protocols
        return []


def texts() -> dict[str, str]:
    """The golden files by name."""
    recipes = {f"recipe_{name}.txt": resolved(find_recipe(name, {})) for name in recipe_names()}
    return {**recipes, "public_names.txt": public_names()}


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
        print(f"{FOLDER / name}: {text.count(chr(10))} lines", file=sys.stderr)
