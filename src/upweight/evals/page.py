"""The report's page: everything that the artifacts of a recipe say, as one HTML file that opens offline.

It is made from directories alone (manifests, metrics, tables, samples), so it can be made at any moment of a run, and
each of its numbers stands under the artifact that it came from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
from bokeh.embed import components
from bokeh.model import Model
from bokeh.resources import Resources

from upweight.evals.curves import curves, intervals, read_metrics
from upweight.store.artifact import MANIFEST, building_identity, read_manifest

EXAMPLES_A_FILE = 3
FILES_A_STEP = 8
LONGEST_TEXT = 1200
LONGEST_LIST = 12
SHORT = 80
WHOLE_BYTES = 1 << 26
NO_EXAMPLES = ("metrics.jsonl", "heldout.jsonl")
UNREADABLE = ("tokens", "logprobs", "tool_calls", "tool_call_id", "trained", "policy")


@dataclass
class StepView:
    """One step as the page shows it."""

    name: str
    stage: str = ""
    complete: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    charts: Sequence[str] = ()
    examples: Sequence[tuple[str, Sequence[Any]]] = ()
    rank: int = 0

    @property
    def seconds(self) -> float:
        return float(self.manifest.get("timings", {}).get("seconds", 0.0))

    @property
    def planned_seconds(self) -> float:
        return float(self.manifest.get("planned", {}).get("seconds", 0.0))


def render_page(inputs: Mapping[str, Path], title: str, ledger: Any = None, *, again_seconds: int = 0) -> str:
    """The page about the artifacts `inputs`, by the names that the reader knows them by.

    Args:
        ledger: of the documents (curate/ledger.py), where there is one.
        again_seconds: after how long a browser reads the page again; 0 for one that does not change any more.
    """
    figures: dict[str, Model] = {}
    steps = [_view(name, path, figures) for name, path in inputs.items()]
    _rank(steps)
    evaluations = [_evaluation(step, figures) for step in steps if _is_evaluation(step.summary)]
    script, charts = components(figures) if figures else ("", {})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=shown_figure, duration=shown_duration, size=shown_size, words=words)
    environment.globals.update(shape=shape)
    template = environment.from_string(files("upweight.evals").joinpath("page.html").read_text())
    return template.render(
        title=title,
        ledger=ledger,
        again_seconds=again_seconds,
        steps=steps,
        ranks=[[step for step in steps if step.rank == rank] for rank in range(1 + max(step.rank for step in steps))],
        evaluations=evaluations,
        charts=charts,
        script=script,
        library=Resources(mode="inline", components=["bokeh"]).render_js() if figures else "",
        seconds=sum(step.seconds for step in steps),
        planned_seconds=sum(step.planned_seconds for step in steps),
        disk_bytes=sum(step.manifest.get("disk_bytes", 0) for step in steps),
        complete=sum(step.complete for step in steps),
        environment=next((step.manifest["environment"] for step in reversed(steps) if step.complete), {}),
        finished=max((step.manifest["timings"]["finished"] for step in steps if step.complete), default=""),
    )


def _view(name: str, path: Path, figures: dict[str, Model]) -> StepView:
    manifest = read_manifest(path / MANIFEST) if (path / MANIFEST).exists() else {}
    identity = manifest["identity"] if manifest else building_identity(path)
    charts = []
    for index, made in enumerate(curves(read_metrics(path / "metrics.jsonl"))):
        charts.append(f"{name}-{index}")
        figures[charts[-1]] = made
    settings = identity.get("config", {})
    return StepView(
        name=manifest.get("step", name),
        stage=identity.get("stage", ""),
        complete=bool(manifest),
        inputs={key: source["step"] for key, source in identity.get("inputs", {}).items()},
        settings=settings if isinstance(settings, Mapping) else {"value": settings},
        summary=manifest.get("summary", {}),
        manifest=manifest,
        charts=charts,
        examples=_examples(path),
    )


def _rank(steps: Sequence[StepView]) -> None:
    """A step stands one rank below the lowest of its inputs, in whatever order the steps are given."""
    by_name = {step.name: step for step in steps}

    @cache
    def rank(name: str) -> int:
        return 1 + max((rank(source) for source in by_name[name].inputs.values() if source in by_name), default=-1)

    for step in steps:
        step.rank = rank(step.name)


def _is_evaluation(summary: Mapping[str, Any]) -> bool:
    rows = summary.get("rows")
    return isinstance(rows, list) and bool(rows) and {"checkpoint", "family", "mean"} <= rows[0].keys()


def _evaluation(step: StepView, figures: dict[str, Model]) -> dict[str, Any]:
    """One evaluation as a matrix: a row for each checkpoint, a column for each family."""
    rows = step.summary["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    charts = []
    for family in families:
        charts.append(f"{step.name}-{family}")
        figures[charts[-1]] = intervals(family, [row for row in rows if row["family"] == family])
    return {
        "step": step.name,
        "k": rows[0]["k"],
        "temperature": step.summary.get("temperature"),
        "families": families,
        "checkpoints": list(dict.fromkeys(row["checkpoint"] for row in rows)),
        "cells": {(row["checkpoint"], row["family"]): row for row in rows},
        "differences": step.summary.get("differences", []),
        "charts": charts,
    }


def _examples(path: Path) -> list[tuple[str, list[Any]]]:
    """A few records of each file of records, spread evenly over it."""
    found: list[tuple[str, list[Any]]] = []
    for file in sorted([*path.glob("*.jsonl"), *path.glob("*/*.jsonl")]):
        if file.name not in NO_EXAMPLES and not file.name.startswith("."):
            found.append((str(file.relative_to(path)), [readable(record) for record in _records(file)]))
    for file in sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid:  # it is being written
            continue
        if "text" in table.schema_arrow.names or "excerpt" in table.schema_arrow.names:
            rows = table.read_row_group(0).slice(0, 1000).to_pylist() if table.num_row_groups else []
            found.append((str(file.relative_to(path)), [readable(rows[index]) for index in _spread(len(rows))]))
    return [item for item in found if item[1]][:FILES_A_STEP]


def _records(file: Path) -> list[Any]:
    """A few records, evenly over the file; of a large one evenly over its bytes, so that it is not read whole."""
    size = file.stat().st_size
    if size <= WHOLE_BYTES:
        lines = [line for line in file.read_bytes().splitlines() if line.strip()]
        chosen = [lines[index] for index in _spread(len(lines))]
    else:
        chosen = []
        with file.open("rb") as opened:
            for start in _spread(size):
                opened.seek(start)
                if start:
                    opened.readline()  # the rest of a line that began before
                chosen.append(opened.readline())
    records = []
    for line in chosen:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that is being written
            continue
    return records


def _spread(count: int) -> list[int]:
    """Up to EXAMPLES_A_FILE places, evenly over `count`."""
    shown = min(EXAMPLES_A_FILE, count)
    return [index * count // shown for index in range(shown)]


def readable(value: Any) -> Any:
    """A record as a person reads it: without token ids, long texts and lists cut, a group of completions beside its
    verdicts."""
    if isinstance(value, Mapping):
        if "completions" in value and "verdicts" in value:
            judged = zip(value["completions"], value["verdicts"], strict=False)
            rows = [{**readable(verdict), **readable(completion)} for completion, verdict in judged]
            return {"problem": readable(value.get("problem")), "completions": rows[:LONGEST_LIST]}
        return {
            key: readable(item) for key, item in value.items() if key not in UNREADABLE and item not in (None, [], "")
        }
    if isinstance(value, (list, tuple)):
        return [readable(item) for item in value[:LONGEST_LIST]]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]} [... {len(value) - LONGEST_TEXT:,} more characters]"
    return value


def shape(value: Any) -> str:
    """How the template shows a value; "figures" are fields that are all short."""
    if value is None or value == [] or value == {}:
        return "empty"
    if isinstance(value, Mapping):
        if all(map(_is_row, value.values())):
            return "matrix"
        return "figures" if all(map(_is_short, value.values())) else "fields"
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, Mapping) for item in value):
            if all({"role", "content"} <= item.keys() for item in value):
                return "messages"
            return "table" if all(_is_short(cell) for item in value for cell in item.values()) else "list"
        return "line" if all(map(_is_short, value)) else "list"
    if isinstance(value, str):
        return "word" if _is_short(value) else "text"
    return "number"


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_short, value.values()))


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= SHORT and "\n" not in value
    return value is None or isinstance(value, (int, float))


def shown_figure(value: Any) -> str:
    """A number with four digits, thousands apart."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


def shown_duration(seconds: float | int) -> str:
    """Seconds as 12s, 3m05s or 2h10m."""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def shown_size(size_bytes: float | int) -> str:
    """Bytes in kB, MB, GB or TB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= 0.9995 * unit:  # three digits round up to the next unit
            return f"{size_bytes / unit:.3g} {name}"
    return f"{size_bytes:.0f} B"


def words(value: str) -> str:
    """A name as words; a time without its zone."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return value.replace("_", " ")
