"""A recipe is a plan and nothing else: steps, what each is configured with, and which steps it reads from.

Making one runs nothing and reads nothing, so it can be printed, compared, planned and tested.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import canonical_json, fingerprint, plain, seed_for

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
STAGE_PARTS = ("Config", "run", "estimate")
SHOWN = 80


@dataclass(frozen=True)
class Step:
    """One artifact to be: a stage, its configuration and its inputs.

    Attributes:
        name: the artifact's directory; unique within the recipe. The step's seed is derived from it.
        stage: a module of upweight.stages, or any object with `Config`, `run` and `estimate`.
        config: an instance of the stage's Config, or a mapping of its fields.
        inputs: the steps that it reads, by the names under which the stage asks for them.
    """

    name: str
    stage: Any
    config: Any
    inputs: Mapping[str, "Step"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"step {self.name!r}: a step's name is the name of its directory; "
                "use letters, digits, underscore, dot and minus, and begin with a letter or digit"
            )
        missing = [part for part in STAGE_PARTS if not hasattr(self.stage, part)]
        if missing:
            raise UserError(
                f"step {self.name!r}: its stage {self.stage!r} has no {', '.join(missing)}. A stage is a module of "
                "upweight.stages or an object of your own with Config, run(config, work) and estimate(config, inputs)"
            )
        if not isinstance(self.inputs, Mapping) or not all(isinstance(step, Step) for step in self.inputs.values()):
            raise UserError(
                f"step {self.name!r}: its inputs are {str(self.inputs)[:SHOWN]}: expected the steps that it reads, by "
                "the names under which its stage asks for them"
            )
        if isinstance(self.config, Mapping):
            object.__setattr__(self, "config", configured(self.stage.Config, self.config, f"step {self.name!r}"))
        elif not isinstance(self.config, self.stage.Config):
            raise UserError(
                f"step {self.name!r}: stage {self.stage_name} takes {self.stage_name}.Config, "
                f"not {type(self.config).__module__}.{type(self.config).__qualname__}"
            )

    @property
    def stage_name(self) -> str:
        """The verb: the module's last name, or the name of the user's class."""
        if isinstance(self.stage, ModuleType):
            return self.stage.__name__.rpartition(".")[2]
        owner = self.stage if isinstance(self.stage, type) else type(self.stage)
        return owner.__name__

    def seed(self, recipe_seed: int) -> int:
        """The seed of this step: it does not move when other steps come or go."""
        return seed_for(recipe_seed, self.name)


@dataclass(frozen=True)
class Recipe:
    """A named plan.

    Attributes:
        name: the directory of its artifacts below the root.
        goal: the step, or the steps, that are wanted; what they need follows from their inputs.
        seed: every step's seed is derived from this one and the step's name.
    """

    name: str
    goal: Step | tuple[Step, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"recipe {self.name!r}: its name is the name of a directory; "
                "use letters, digits, underscore, dot and minus, and begin with a letter or digit"
            )
        if not self.goals or not all(isinstance(goal, Step) for goal in self.goals):
            raise UserError(
                f"recipe {self.name!r}: its goal is {str(self.goal)[:SHOWN]}: expected a step, or a tuple of steps"
            )
        self.steps()

    @property
    def goals(self) -> tuple[Step, ...]:
        """The wanted steps."""
        return self.goal if isinstance(self.goal, tuple) else (self.goal,)

    def steps(self) -> tuple[Step, ...]:
        """All steps, each after its inputs, in the order in which the goal asks for them.

        Raises UserError where two different steps carry the same name.
        """
        placed: dict[str, Step] = {}
        for goal in self.goals:
            _place(goal, placed)
        return tuple(placed.values())

    def step(self, name: str) -> Step:
        """The step of that name. Raises UserError, suggesting the nearest names."""
        named = {step.name: step for step in self.steps()}
        if name not in named:
            raise UserError(f"recipe {self.name} has no step {name!r}{suggestion(name, named)}")
        return named[name]

    def dependents(self, name: str) -> tuple[Step, ...]:
        """The step of that name and every step that reads from it, directly or through others."""
        reached = {self.step(name).name}
        for step in self.steps():
            if any(source.name in reached for source in step.inputs.values()):
                reached.add(step.name)
        return tuple(step for step in self.steps() if step.name in reached)

    def until(self, name: str | None) -> tuple[Step, ...]:
        """The steps that the step of that name needs, itself the last; all steps where `name` is None."""
        if name is None:
            return self.steps()
        placed: dict[str, Step] = {}
        _place(self.step(name), placed)
        return tuple(placed.values())

    def identities(self) -> dict[str, dict[str, object]]:
        """What each step's artifact is made of, by step: stage, configuration, the inputs' fingerprints and the seed.

        An input counts through the fingerprint of its own identity, so a change far upstream reaches every step below.
        """
        found: dict[str, dict[str, object]] = {}
        for step in self.steps():
            try:
                config = plain(step.config)
                canonical_json(config)
            except (TypeError, ValueError) as error:  # ValueError: infinity, or what is no number
                raise UserError(f"step {step.name!r}: its configuration cannot be stored: {error}") from None
            found[step.name] = {
                "stage": step.stage_name,
                "config": config,
                "inputs": {
                    key: {"step": source.name, "fingerprint": fingerprint(found[source.name])}
                    for key, source in sorted(step.inputs.items())
                },
                "seed": self.seed,
            }
        return found


def _place(step: Step, placed: dict[str, Step]) -> None:
    """Put `step` behind its inputs. Recursion ends: a frozen step is made after what it reads."""
    known = placed.get(step.name)
    if known is not None:
        if known is not step and known != step:
            raise UserError(
                f"two different steps are named {step.name!r} (stages {known.stage_name} and {step.stage_name}): "
                "a step's name is the name of its artifact, so give one of them another name"
            )
        return
    for source in step.inputs.values():
        _place(source, placed)
    placed[step.name] = step


def configured(kind: type, fields: Mapping[str, Any], where: str) -> Any:
    """`kind(**fields)`, where a field that `kind` does not have is a UserError that names the nearest one."""
    names = [item.name for item in dataclasses.fields(kind) if item.init]
    for given in fields:
        if given not in names:
            raise UserError(f"{where}: {kind.__qualname__} has no field {given!r}{suggestion(given, names)}")
    required = [
        item.name
        for item in dataclasses.fields(kind)
        if item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    absent = [name for name in required if name not in fields]
    if absent:
        raise UserError(f"{where}: {kind.__qualname__} needs {', '.join(absent)}; add what is missing")
    return kind(**fields)


def suggestion(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The end of a sentence about a name that is not there: the nearest names, or all of them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": there is {', '.join(sorted(known)) or 'none'}"
