"""From what a person types after --on to a benchmark.

gsm8k                      a benchmark of ours (`upweight eval --help` lists them), its data from hub or package
gpqa=gpqa_diamond.csv      the same with its data in a file
bfcl:multiple+parallel     parts of it
my_problems.jsonl          problems of one's own
my_benchmark.py            a benchmark of one's own
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from upweight import evals, verify
from upweight.app.find import find_module
from upweight.app.recipe import suggestion
from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Verifier
from upweight.evals.problem_files import ProblemFile, kind_of, read_problems
from upweight.evals.setting import Setting, asked_name, benchmark_names, open_module, open_named
from upweight.verify.answers import AnswerVerifier
from upweight.verify.code_tests import CodeVerifier
from upweight.verify.gym import GymVerifier

FILE_SAMPLES = 8
JUDGING = (evals, verify)


class Found(NamedTuple):
    """A benchmark, and the fingerprint of the code that asks and judges: verdicts that other code gave are others."""

    benchmark: Benchmark
    source: str


def find_benchmarks(given: Sequence[str], setting: Setting) -> list[Found]:
    """The benchmarks that are named, each of which may hold several names with commas between them.

    Raises UserError where one is not there, lacks what it needs, or a name is given twice.
    """
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"name what to measure on: --on {','.join(benchmark_names()[:3])}, or a file of problems")
    found = [Found(find_benchmark(name, setting), _source(name)) for name in names]
    taken = [benchmark.name for benchmark, _ in found]
    repeated = sorted({name for name in taken if taken.count(name) > 1})
    if repeated:
        raise UserError(f"{repeated[0]} is named twice: results are kept by name, so measure them one after the other")
    return found


def _source(given: str) -> str:
    """Of our packages that ask and judge, and of one's own file."""
    files = sorted(file for package in JUDGING for file in Path(str(package.__path__[0])).rglob("*.py"))
    own = [Path(given)] if given.endswith(".py") else []
    digest = hashlib.sha256()
    for file in [*files, *own]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def find_benchmark(given: str, setting: Setting) -> Benchmark:
    """The benchmark that `given` names."""
    if given.endswith(".py"):
        return open_module(find_module(given), given, setting)
    name = asked_name(given)
    if name in benchmark_names():
        return open_named(given, setting)
    path = Path(given)
    if path.is_file() or path.suffix == ".jsonl":
        verifiers: Mapping[str, Verifier] = {
            "answer": AnswerVerifier(),
            "code": CodeVerifier(setting.sandbox),
            "gym": GymVerifier(unsafe=setting.unsafe),
        }
        verifier = verifiers[kind_of(read_problems(path), path)]
        return ProblemFile(path.stem, path, verifier, samples=setting.samples or FILE_SAMPLES)
    raise UserError(
        f"there is no benchmark and no file {name!r}{suggestion(name, benchmark_names())}. "
        "A file of problems (.jsonl) or a benchmark of your own (.py) can be named as well"
    )
