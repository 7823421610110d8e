"""Lineage: from a checkpoint back to its documents, by the manifests alone.

Each manifest names its inputs by step and fingerprint; where an input's artifact has another fingerprint today, the
walk says so instead of passing it off as the origin.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.app.recipe import NAME, Recipe
from upweight.core.errors import UserError
from upweight.core.hub import HUB_NAME, find_directory
from upweight.store.artifact import LocalStore

WEIGHTS = Path("model") / "config.json"
NOT_A_POLICY = ("reward",)


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One artifact on the way back.

    Attributes:
        depth: 0 for the artifact that the walk began with.
        key: the name under which its reader knows it; empty for the first.
        manifest: None where the artifact is no longer there.
        changed: it is no longer the one that its reader read.
        repeated: its own inputs were walked before.
    """

    depth: int
    key: str
    step: str
    manifest: Mapping[str, Any] | None
    changed: bool
    repeated: bool


def lineage(store: LocalStore, step: str) -> Iterator[Ancestor]:
    """The artifact of `step` and everything that it was made from, depth first, each one's inputs once."""
    seen: set[str] = set()

    def walk(depth: int, key: str, name: str, expected: str | None) -> Iterator[Ancestor]:
        manifest = store.manifest(name)
        changed = manifest is not None and expected is not None and manifest["fingerprint"] != expected
        yield Ancestor(depth, key, name, manifest, changed, name in seen)
        if manifest is None or name in seen:
            return
        seen.add(name)
        for input_key, source in manifest["identity"]["inputs"].items():
            yield from walk(depth + 1, input_key, source["step"], source["fingerprint"])

    return walk(0, "", step, None)


def final_checkpoint(recipe: Recipe, store: LocalStore) -> str | None:
    """The last complete step that made a model to talk to; a reward model is none."""
    made = [
        step.name
        for step in recipe.steps()
        if step.stage_name not in NOT_A_POLICY and (store.directory / step.name / WEIGHTS).exists()
    ]
    return made[-1] if made else None


def find_model(given: str, root: Path) -> Path:
    """The model directory that a person names.

    Args:
        given: a directory in Hugging Face format, an artifact that has one in `model/`, RECIPE for its final
            checkpoint, or RECIPE:STEP. A recipe may be a name of ours, a file of one's own, or a name below the root.
            Or "owner/name" on the hub, which is fetched where it is not at hand.

    Raises UserError where nothing of the kind is there.
    """
    path = Path(given)
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if HUB_NAME.fullmatch(given) and not path.exists():
        return find_directory(given)
    name, _, step = given.rpartition(":") if ":" in given else (given, "", "")
    store, recipe = _store_of(name, root)
    if step:
        if recipe is not None:
            recipe.step(step)
        directory = store.open(step) / "model"
        if not (directory / "config.json").exists():
            raise UserError(f"{store.directory / step} holds no model: name a step that makes one (show {name})")
        return directory
    if recipe is None:
        raise UserError(f"{given}: name the step as well, {given}:STEP; there is {', '.join(_with_model(store))}")
    final = final_checkpoint(recipe, store)
    if final is None:
        raise UserError(f"{store.directory} holds no complete checkpoint yet: build one with `upweight run {name}`")
    return store.directory / final / "model"


def _store_of(name: str, root: Path) -> tuple[LocalStore, Recipe | None]:
    # a recipe's module loads the stages and with them torch and the engines; a directory needs none of that
    from upweight.app.find import find_recipe, recipe_names

    if name.endswith(".py") or name in recipe_names():
        recipe = find_recipe(name, {})
        return LocalStore(root, recipe.name), recipe
    if NAME.fullmatch(name) and (root / name).is_dir():
        return LocalStore(root, name), None
    raise UserError(
        f"{name!r} is no model directory (one with a config.json), no recipe ({', '.join(recipe_names())}) "
        f"and no directory below {root}"
    )


def _with_model(store: LocalStore) -> list[str]:
    return sorted(path.parent.parent.name for path in store.directory.glob(f"*/{WEIGHTS}")) or ["none with a model"]
