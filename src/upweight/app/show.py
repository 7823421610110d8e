"""What is there: the state of each step, the lineage of the final checkpoint, one step in full, and the report."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from upweight.app.console import NARROW, duration, size
from upweight.app.lineage import Ancestor, final_checkpoint, lineage
from upweight.app.recipe import Recipe
from upweight.app.runner import standings, written_since
from upweight.core.errors import UserError
from upweight.stages.report import write_page
from upweight.store.artifact import LocalStore, described

FIGURES_SHOWN = 4
STYLES = {"complete": "green", "stale": "red", "begun": "yellow", "missing": "dim"}


def print_state(recipe: Recipe, root: Path, console: Console | None = None) -> None:
    """The state of each step, then the lineage of the final checkpoint down to the documents."""
    console = console or Console()
    store = LocalStore(root, recipe.name)
    table = Table(title=f"{recipe.name} below {store.directory}", title_justify="left", **NARROW)
    for heading in ("step", "stage", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("figures")
    for standing in standings(recipe, store):
        manifest = store.manifest(standing.step.name) or {}
        figures = described(list(standing.apart)) if standing.apart else headline(manifest.get("summary", {}))
        table.add_row(
            standing.step.name,
            standing.step.stage_name,
            f"[{STYLES[standing.state]}]{standing.state}[/]",
            duration(manifest["timings"]["seconds"]) if manifest else "",
            size(manifest["disk_bytes"]) if manifest else "",
            escape(figures),
        )
    console.print(table)
    final = final_checkpoint(recipe, store)
    if final is None:
        console.print("no checkpoint is complete yet, so there is no lineage to show", highlight=False)
    else:
        console.print(f"\nlineage of the final checkpoint, {store.directory / final / 'model'}:", highlight=False)
        console.print(_tree(lineage(store, final)))


def _tree(ancestors: Any) -> Tree:
    """The walk as a tree; an artifact that several steps read is unfolded once."""
    branches: list[Tree] = []
    for ancestor in ancestors:
        label = _label(ancestor)
        del branches[ancestor.depth :]
        branches.append(branches[-1].add(label) if branches else Tree(label))
    return branches[0]


def _label(ancestor: Ancestor) -> str:
    key = f"{ancestor.key}: " if ancestor.key else ""
    if ancestor.manifest is None:
        return f"{key}[red]{ancestor.step} is no longer there[/]"
    manifest = ancestor.manifest
    name = f"{key}[bold]{ancestor.step}[/] [dim]{manifest['identity']['stage']} {manifest['fingerprint']}[/]"
    if ancestor.changed:
        name += " [red]built anew since it was read[/]"
    if ancestor.repeated:
        return f"{name} [dim](unfolded above)[/]"
    figures = headline(manifest["summary"])
    return f"{name}  {escape(figures)}" if figures else name


def headline(summary: Mapping[str, Any]) -> str:
    """The first few plain figures of a summary, in one line."""
    shown = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in summary.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return ", ".join(shown[:FIGURES_SHOWN])


def print_step(recipe: Recipe, root: Path, name: str, console: Console | None = None) -> None:
    """The manifest of one step: settings, figures, timings."""
    console = console or Console()
    store = LocalStore(root, recipe.name)
    recipe.step(name)
    manifest = store.manifest(name)
    if manifest is None:
        raise UserError(f"step {name} is not complete yet: build it with `upweight run {recipe.name} --until {name}`")
    console.print_json(json.dumps(manifest))


def print_intended(
    recipe: Recipe, root: Path, *, rebuild: Sequence[str] = (), until: str | None = None, console: Console | None = None
) -> None:
    """What `run` would do, without doing it."""
    console = console or Console()
    doomed = {step.name for name in rebuild for step in recipe.dependents(name)}
    wanted = [step.name for step in recipe.until(until)]
    intentions = {"complete": "skip", "stale": "refuse", "begun": "continue", "missing": "build"}
    store = LocalStore(root, recipe.name)
    for standing in standings(recipe, store):
        name = standing.step.name
        if name in doomed and name not in wanted:
            console.print(f"remove    {name}", highlight=False)
        elif name in wanted:
            verb = "rebuild" if name in doomed else intentions[standing.state]
            differs = described(standing.own or list(standing.apart))
            reasons = {"refuse": f": {differs}", "build": f": what was begun is removed, {differs}"}
            why = written_since(standing.step, store) if verb == "skip" else reasons.get(verb, "") if differs else ""
            console.print(f"{verb:9} {name} ({standing.step.stage_name}){escape(why)}", highlight=False, soft_wrap=True)


def follow_report(recipe: Recipe, root: Path, out: Path, again_seconds: int, console: Console | None = None) -> None:
    """Write the page again and again while a run goes on, until every step is complete; a browser reads it again."""
    console = console or Console()
    store = LocalStore(root, recipe.name)
    told = ""
    while True:
        complete = sum(store.manifest(step.name) is not None for step in recipe.steps())
        line = f"{out}: {complete} of {len(recipe.steps())} steps are complete"
        if line != told:
            console.print(line, highlight=False, soft_wrap=True)
            told = line
        done = complete == len(recipe.steps())
        try:
            write_report(recipe, root, out, again_seconds=0 if done else again_seconds)
        except FileNotFoundError:  # a step became complete, and its directory got its name, while it was read
            done = False
        if done:
            return
        time.sleep(again_seconds)


def write_report(recipe: Recipe, root: Path, out: Path, *, again_seconds: int = 0) -> Path:
    """The page about what is there now: complete artifacts, and the metrics of those being built."""
    store = LocalStore(root, recipe.name)
    found = {}
    for step in recipe.steps():
        for path in (store.directory / step.name, store.building(step.name)):
            if path.exists() and step.stage_name != "report":
                found[step.name] = path
                break
    if not found:
        raise UserError(
            f"nothing of {recipe.name} is built below {store.directory}: `upweight run {recipe.name}` first"
        )
    if out.is_dir():
        raise UserError(f"{out} is a directory: name the file to write, {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(found, out, title=recipe.name, again_seconds=again_seconds)
    return out
