"""`upweight eval`: models of any origin on benchmarks, with a table, intervals and paired differences.

OUT/MODEL/BENCHMARK.jsonl    the samples that the table counts, each with its verdict and reason
OUT/table.json               the table
OUT/cache/                   every problem's samples by model and decoding: what is there is not sampled again
"""

import fcntl
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from upweight.app.benchmarks import find_benchmarks
from upweight.app.console import NARROW, ConsoleMonitor
from upweight.app.inspect_logs import require_inspect, write_log
from upweight.app.sampler import Opened, check_model, open_sampler
from upweight.core.errors import RootInUse, UserError
from upweight.core.identity import canonical_json, fingerprint
from upweight.core.protocols import Benchmark, Limits
from upweight.core.records import Problem, Sample
from upweight.core.work import Machine
from upweight.evals.measure import difference, measure, table_row
from upweight.evals.setting import Setting
from upweight.model.precision import Precision
from upweight.rollout.sandbox import Sandbox
from upweight.store.artifact import write_whole
from upweight.text.conversations import evenly

FIGURES_SHOWN = 12


@dataclass(frozen=True)
class Decoding:
    """What the user says about decoding; what is None is left to the benchmark, which takes the report's settings."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def limits(self, benchmark: Benchmark) -> Limits:
        """How to decode on `benchmark`. Raises UserError where the settings are none."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        try:
            return replace(benchmark.limits, **given)
        except ValueError as error:
            raise UserError(str(error)) from error


def measure_models(
    models: Sequence[str],
    on: Sequence[str],
    *,
    root: Path,
    out: Path,
    k: int = 0,
    count: int = 0,
    decoding: Decoding = Decoding(),
    judge: str | None = None,
    machine: Machine,
    dtype: Precision | None = None,
    inspect_logs: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure each model on each benchmark, print the table, write it to `out`/table.json and return it.

    Args:
        models: see app/sampler.py.
        on: see app/benchmarks.py.
        k: samples of each problem; 0 takes the benchmark's own number.
        count: so many problems of each, evenly from all; 0 takes all.
        judge: the model that judges, for benchmarks that need one.
        dtype: what local weights are held in; None takes what is usual on the device.
        inspect_logs: a folder for logs of inspect-ai, one for each model and benchmark.

    Raises UserError where a model, a benchmark or its data are not there, before anything is sampled.
    """
    console = console or Console()
    if not models:
        raise UserError("name at least one model: a directory, RECIPE, RECIPE:STEP, a hub name or an endpoint")
    _check_counts(k, count)
    if inspect_logs is not None:
        require_inspect()
    for model in models:
        check_model(model, root)
    found: dict[tuple[str, str], list[Sample]] = {}
    with ExitStack() as stack:
        judging = stack.enter_context(open_sampler(judge, root=root, machine=machine, dtype=dtype)) if judge else None
        sandbox = stack.enter_context(Sandbox(workers=machine.workers, unsafe=machine.unsafe_execution))
        setting = Setting(
            samples=k,
            seed=decoding.seed,
            sandbox=sandbox,
            judge=judging.sampler if judging is not None else None,
            unsafe=machine.unsafe_execution,
        )
        sources = find_benchmarks(on, setting)
        benchmarks = [benchmark for benchmark, _ in sources]
        decodings = {benchmark.name: decoding.limits(benchmark) for benchmark in benchmarks}
        problems = {benchmark.name: _chosen(benchmark, count) for benchmark in benchmarks}
        judged_by = judging.identity if judging is not None else None
        for model in models:
            with open_sampler(model, root=root, machine=machine, dtype=dtype) as opened:
                for benchmark, source in sources:
                    name = benchmark.name
                    origin = {
                        "model": opened.identity,
                        "limits": asdict(decodings[name]),
                        "judge": judged_by,
                        "benchmark": [name, source],
                        "upweight": importlib.metadata.version("upweight"),
                    }
                    place = _Place(out, model, name)
                    found[model, name] = _measured(
                        opened, benchmark, problems[name], place, decodings[name], origin, console
                    )
        table = _table(models, benchmarks, found)
    write_whole(out / "table.json", json.dumps(table, indent=1))
    if inspect_logs is not None:
        for row in table["rows"]:
            model, name = row["checkpoint"], row["family"]
            samples, limits = found[model, name], decodings[name]
            write_log(inspect_logs, model=model, benchmark=name, samples=samples, row=row, limits=limits)
    _print(table, console)
    return table


def check_asked(on: Sequence[str], *, k: int, count: int, decoding: Decoding, machine: Machine) -> None:
    """Raises UserError where `measure_models` would refuse what is asked of it: for whoever trains first."""
    _check_counts(k, count)
    with Sandbox(workers=machine.workers, unsafe=machine.unsafe_execution) as sandbox:
        setting = Setting(samples=k, seed=decoding.seed, sandbox=sandbox, unsafe=machine.unsafe_execution)
        for benchmark, _ in find_benchmarks(on, setting):
            decoding.limits(benchmark)
            benchmark.problems()


def _check_counts(k: int, count: int) -> None:
    if k < 0 or count < 0:
        raise UserError(f"k is {k} and count {count}: expected 0 (all, or the benchmark's own) or more")


@dataclass(frozen=True)
class _Place:
    """Where one model's samples of one benchmark are kept."""

    out: Path
    model: str
    benchmark: str

    @property
    def samples(self) -> Path:
        return self.out / file_name(self.model) / f"{file_name(self.benchmark)}.jsonl"

    def kept(self, origin: Mapping[str, object]) -> Path:
        return self.out / "cache" / fingerprint(origin) / f"{file_name(self.benchmark)}.jsonl"


def file_name(given: str) -> str:
    """A model's or benchmark's name as the name of a file."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in given.rstrip("/"))


def _chosen(benchmark: Benchmark, count: int) -> list[Problem]:
    problems = benchmark.problems()
    return list(evenly(problems, len(problems), count)) if count else list(problems)


def _measured(
    opened: Opened,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    place: _Place,
    limits: Limits,
    origin: Mapping[str, object],
    console: Console,
) -> list[Sample]:
    """The samples; of problems that were asked before in all as `origin` says, those of then."""
    kept = place.kept(origin)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept.parent / "origin.json", canonical_json(origin))
    place.samples.parent.mkdir(parents=True, exist_ok=True)
    monitor = ConsoleMonitor(console, place.samples.parent, place.samples.parent.name)
    try:
        with _alone(kept):
            return measure(
                opened.sampler,
                benchmark,
                place.samples,
                limits=limits,
                monitor=monitor,
                label=benchmark.name,
                problems=problems,
                problems_a_block=max(1, opened.rows // benchmark.samples),
                kept=kept,
            )
    finally:
        monitor.close()
        monitor.forget()


@contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """Hold a file of kept samples: two processes that add to it at once would tear each other's lines.

    Raises RootInUse where another process does.
    """
    with kept.with_suffix(".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RootInUse(
                f"another process measures the same model on {kept.stem}, into {kept}: wait until it ends, stop it, or "
                "give this one another --out"
            ) from None
        yield


def _table(
    models: Sequence[str], benchmarks: Sequence[Benchmark], found: Mapping[tuple[str, str], list[Sample]]
) -> dict[str, list[dict[str, Any]]]:
    return {
        "rows": [
            {
                "checkpoint": model,
                "family": benchmark.name,
                **table_row(benchmark, found[model, benchmark.name]),
                "figures": {
                    name: round(value, 6) for name, value in benchmark.figures(found[model, benchmark.name]).items()
                },
            }
            for benchmark in benchmarks
            for model in models
        ],
        "differences": [
            {"before": before, "after": after, "family": benchmark.name}
            | difference(found[before, benchmark.name], found[after, benchmark.name])
            for benchmark in benchmarks
            for before, after in pairwise(models)
        ],
    }


def _print(table: dict[str, list[dict[str, Any]]], console: Console) -> None:
    drawn = Table("on", "model", **NARROW)
    for heading in ("avg@k", "95% interval", "pass@k", "maj@k", "k", "problems", "cut off", "tokens"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in table["rows"]:
        drawn.add_row(
            row["family"],
            row["checkpoint"],
            f"{row['mean']:.3f}",
            _interval(row),
            *(_share(row.get(figure)) for figure in ("pass_at_k", "maj_at_k")),
            str(row["k"]),
            str(row["problems"]),
            f"{row['truncated_share']:.1%}",
            f"{row['mean_tokens']:.0f}" if row["mean_tokens"] else "-",
        )
    console.print(drawn)
    for row in table["rows"]:
        shown = [f"{name} {value:.3f}" for name, value in row["figures"].items()]
        more = f", and {len(shown) - FIGURES_SHOWN} more in table.json" if len(shown) > FIGURES_SHOWN else ""
        if shown:
            _line(console, f"{row['family']}, {row['checkpoint']}: {', '.join(shown[-FIGURES_SHOWN:])}{more}")
    for row in table["differences"]:
        verdict = "significant at 5%" if row["significant"] else "within the noise"
        pair = f"{row['after']} against {row['before']}"
        _line(console, f"{row['family']}: {pair}: {row['mean']:+.3f} [{_interval(row)}], {verdict}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _interval(row: Mapping[str, Any]) -> str:
    return "one problem: none" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
