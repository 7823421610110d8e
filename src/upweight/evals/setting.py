"""What a benchmark is opened with, and the benchmarks by name: `upweight eval MODEL --on NAME`.

A module of evals/benchmarks/, or a file of one's own, has `benchmark`: a Benchmark, or a function of a Setting that
makes one.
"""

import importlib
import pkgutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Sampler
from upweight.rollout.sandbox import Sandbox

PACKAGE = "upweight.evals.benchmarks"


@dataclass(frozen=True)
class Setting:
    """What the user says beyond a benchmark's name.

    Attributes:
        data: a file of the benchmark's data, where it is at hand; None takes the name on the hub, or the package.
        parts: which of the benchmark's parts (categories, families, languages), where it has some; () takes all.
        samples: the k of avg@k; 0 takes the benchmark's own.
        seed: of what a benchmark draws itself: the order of options, generated problems.
        sandbox: where programs run; it starts when the first one does. None takes the pool of the process.
        unsafe: judge without isolation where isolation is not to be had.
        judge: the language model that judges pairs, for benchmarks that need one.
    """

    data: Path | None = None
    parts: tuple[str, ...] = ()
    samples: int = 0
    seed: int = 0
    sandbox: Sandbox | None = None
    judge: Sampler | None = None
    unsafe: bool = False


def benchmark_names() -> list[str]:
    """The benchmarks that come with the package."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def asked_name(given: str) -> str:
    """The name in "name", "name:part+part", "name=data" or "name:part=data"."""
    return given.partition("=")[0].partition(":")[0]


def open_named(given: str, setting: Setting) -> Benchmark:
    """The benchmark of that name, of those parts, with its data in that file: "gpqa:Physics=gpqa_diamond.csv"; what is
    not said is as `setting` has it.

    Raises UserError where it lacks what it needs, ModuleNotFoundError where there is none.
    """
    name, (asked, _, data) = asked_name(given), given.partition("=")
    parts = tuple(filter(None, asked.partition(":")[2].split("+")))
    own = replace(setting, data=Path(data) if data else setting.data, parts=parts or setting.parts)
    return open_module(importlib.import_module(f"{PACKAGE}.{name}"), name, own)


def open_module(module: ModuleType, given: str, setting: Setting) -> Benchmark:
    """The benchmark that a module defines."""
    made = getattr(module, "benchmark", None)
    if callable(made):
        made = made(setting)
    if not isinstance(made, Benchmark):
        raise UserError(
            f"{given} defines no benchmark: it needs `benchmark`, an upweight.core.protocols.Benchmark or a function "
            "of an upweight.evals.setting.Setting that returns one (docs/adding.md shows a whole one)"
        )
    return made
