"""`upweight eval`: checkpoints of any origin on files of problems, with a table, intervals and paired differences."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from upweight.app.console import NARROW, ConsoleMonitor
from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.identity import canonical_json
from upweight.core.protocols import Limits
from upweight.core.work import Machine
from upweight.evals.measure import Sample, difference, measure, summary
from upweight.evals.problem_files import ProblemFile, kind_of, read_problems
from upweight.model.language_model import fingerprint, load
from upweight.rollout.local import LocalSampler
from upweight.store.artifact import write_whole
from upweight.text.tokenizer import Tokenizer
from upweight.verify.reward import RewardConfig, open_verifier


def measure_models(
    models: Sequence[str],
    on: Sequence[Path],
    *,
    root: Path,
    out: Path,
    samples: int,
    count: int,
    limits: Limits,
    machine: Machine,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure each model on each file, print the table, write it to `out`/table.json and return it.

    Samples lie in `out`/<model>/<file>.jsonl beside what they were made from (weights, problems, decoding); they are
    read instead of made again where that is the same.

    Raises UserError where a model or a file is not there, before anything is sampled.
    """
    console = console or Console()
    if not models:
        raise UserError("name at least one model: a directory, a RECIPE, or RECIPE:STEP")
    if samples < 1:
        raise UserError(f"k is {samples}: at least one sample of each problem is needed")
    directories = {name: find_model(name, root) for name in models}
    kinds = {path: kind_of(read_problems(path), path) for path in on}
    if machine.threads:
        torch.set_num_threads(machine.threads)
    found: dict[tuple[str, str], list[Sample]] = {}
    for name, directory in directories.items():
        with _opened(directory, machine) as sampler:
            for path in on:
                with open_verifier(RewardConfig(kind=kinds[path]), {}, machine) as verifier:
                    benchmark = ProblemFile(path.stem, path, verifier, samples=samples, count=count)
                    folder = out / name.replace("/", "_").replace(":", "_")
                    found[name, path.stem] = _cached(sampler, benchmark, folder, limits, console)
    table = _table([*directories], [path.stem for path in on], found)
    write_whole(out / "table.json", json.dumps(table, indent=1))
    _print(table, console)
    return table


@contextmanager
def _opened(directory: Path, machine: Machine) -> Iterator[LocalSampler]:
    """A sampler of the model; its memory is free again afterwards."""
    model, _ = load(directory, device=machine.device)
    yield LocalSampler(model.eval(), Tokenizer.load(directory), policy=fingerprint(model))


def _cached(
    sampler: LocalSampler, benchmark: ProblemFile, folder: Path, limits: Limits, console: Console
) -> list[Sample]:
    """The stored samples where they come from the same weights, problems and decoding; new ones otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path, origin = folder / f"{benchmark.name}.jsonl", folder / f"{benchmark.name}.origin.json"
    now = canonical_json(
        {
            "weights": sampler.policy,
            "tokenizer": sampler.tokenizer.fingerprint,
            "template": sampler.tokenizer.chat_template,
            "problems": benchmark.problems(),
            "samples": benchmark.samples,
            "limits": asdict(limits),
        }
    )
    if not origin.exists() or origin.read_text() != now:
        for stale in (path, path.with_name(f".{path.name}.begun")):
            stale.unlink(missing_ok=True)
        write_whole(origin, now)
    monitor = ConsoleMonitor(console, folder, folder.name)
    try:
        return measure(sampler, benchmark, path, limits=limits, monitor=monitor, label=benchmark.name)
    finally:
        monitor.close()
        monitor.forget()


def _table(
    models: Sequence[str], families: Sequence[str], found: dict[tuple[str, str], list[Sample]]
) -> dict[str, list[dict[str, Any]]]:
    return {
        "rows": [
            {"checkpoint": model, "family": family, **summary(found[model, family])}
            for family in families
            for model in models
        ],
        "differences": [
            {"before": before, "after": after, "family": family}
            | difference(found[before, family], found[after, family])
            for family in families
            for before, after in pairwise(models)
        ],
    }


def _print(table: dict[str, list[dict[str, Any]]], console: Console) -> None:
    drawn = Table("on", "model", **NARROW)
    for heading in ("avg@k", "95% interval", "pass@k", "k", "problems", "cut off", "tokens"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in table["rows"]:
        drawn.add_row(
            row["family"],
            row["checkpoint"],
            f"{row['mean']:.3f}",
            _interval(row),
            f"{row['pass_at_k']:.3f}",
            str(row["k"]),
            str(row["problems"]),
            f"{row['truncated_share']:.1%}",
            f"{row['mean_tokens']:.0f}",
        )
    console.print(drawn)
    for row in table["differences"]:
        verdict = "significant at 5%" if row["significant"] else "within the noise"
        pair = f"{row['after']} against {row['before']}"
        console.print(
            f"{row['family']}: {pair}: {row['mean']:+.3f} [{_interval(row)}], {verdict}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _interval(row: dict[str, Any]) -> str:
    return "one problem: none" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
