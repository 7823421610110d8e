"""`upweight ablate CLAIM`: a claim of the recipe as an experiment, run over several seeds, whichever way it comes out.

A claim is a recipe whose goal is an evaluation. Its checkpoints are the arms; the others are held against the first.
The runs of one seed share all steps that the arms have in common, with each other and with the other claims. Labels of
documents are compared alike: there the goal is a step of the stage predict, and its kinds of labels are the arms.

Two intervals are told apart. Within a run, problems are the units: is this checkpoint better than that one? Over runs,
seeds are the units: is this way of training better than that one? Only the second speaks about the claim.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from upweight.app.console import NARROW
from upweight.app.environment import environment
from upweight.app.find import CLAIMS, find_module, find_recipe, recipe_names
from upweight.app.recipe import Recipe, Step
from upweight.app.runner import run
from upweight.core.errors import UserError
from upweight.core.records import Sample
from upweight.core.work import Machine
from upweight.evals.estimators import OverRuns, over_runs
from upweight.evals.measure import difference, summary
from upweight.store.artifact import LocalStore, write_whole
from upweight.store.jsonl import read_jsonl

PROBLEMS = "problems"


def print_claims(console: Console | None = None) -> None:
    """The claims that come with the package, a line each."""
    console = console or Console()
    drawn = Table("claim", "what is claimed", **NARROW)
    for name in recipe_names(CLAIMS):
        drawn.add_row(name, says(find_module(name, CLAIMS).__doc__, name)[0])
    console.print(drawn)


def ablate(
    claim: str,
    *,
    seeds: Sequence[int],
    scale: float | None,
    root: Path,
    machine: Machine,
    write: Path | None = None,
    console: Console | None = None,
    annotated: str | None = None,
    rebuild: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a claim once for each seed below `root`/seed<N>, print and return what came out.

    `annotated` are documents with labels, for the claims that ask for them.

    The result also lies in `root`/<claim>.json, and as a section of the Markdown file `write` where one is given. What
    is complete is not run again, so that seeds can be added later.

    Raises UserError, before anything is run, where the claim's goal compares fewer than two arms, and where its file
    does not say what is claimed.
    """
    console = console or Console()
    if not seeds:
        raise UserError("a claim needs at least one seed to run with; three are the least that shows a spread")
    recipes = {
        seed: find_recipe(claim, {"scale": scale, "seed": seed, "annotated": annotated}, CLAIMS) for seed in seeds
    }
    name = Path(claim).stem if claim.endswith(".py") else claim
    for recipe in recipes.values():
        arms_of(recipe, claim)
    headline, told = says(find_module(claim, CLAIMS).__doc__, name)
    stores = {}
    for seed, recipe in recipes.items():
        console.print(f"{name}: seed {seed}", highlight=False, markup=False)
        stores[seed] = run(recipe, root / f"seed{seed}", machine=machine, console=console, rebuild=rebuild)
    result = {
        "claim": name,
        "says": headline,
        "told": told,
        "date": datetime.date.today().isoformat(),
        "scale": scale,
        "annotated": annotated,
        "seeds": list(seeds),
        "environment": environment(machine),
        **outcome(recipes, stores),
    }
    write_whole(root / f"{name}.json", json.dumps(result, indent=1))
    _print(result, console)
    if write is not None:
        put_section(write, name, section(result))
        console.print(f"written to {write}, raw samples below {root}", highlight=False, markup=False)
    return result


def says(documentation: str | None, name: str) -> tuple[str, str]:
    """The first line of a claim's docstring, and the rest of it."""
    if not documentation:
        raise UserError(f"the claim {name} has no docstring: its first line has to say what is claimed")
    first, _, rest = documentation.strip().partition("\n")
    return first.strip(), rest.strip()


def arms_of(recipe: Recipe, given: str) -> dict[str, Step]:
    """What the claim compares, the reference first, each with the step that makes it. Raises UserError where it is no
    comparison."""
    goal = recipe.goals[-1]
    if goal.stage_name == "predict":
        arms = dict.fromkeys(goal.config.arms, goal)
    else:
        arms = {name: step for name, step in goal.inputs.items() if name != PROBLEMS}
    if goal.stage_name not in ("evaluate", "predict") or len(arms) < 2:
        raise UserError(
            f"{given}: the goal of a claim is a step of the stage evaluate with at least two checkpoints among its "
            f"inputs, or of the stage predict with two arms; {goal.name!r} is of the stage {goal.stage_name} and has "
            f"{len(arms)}"
        )
    return arms


def _measure(goal: Step) -> tuple[str, str]:
    """What a claim's goal measures, and what the units within a run are."""
    if goal.stage_name == "predict":
        return "the share of useless documents ranked below a useful one", "documents"
    return f"avg@{goal.config.samples} at temperature {goal.config.limits.temperature:g}", "problems"


def outcome(recipes: Mapping[int, Recipe], stores: Mapping[int, LocalStore]) -> dict[str, Any]:
    """Arms, differences from the first arm, and what each arm cost beyond what all share; by family of problems."""
    first = next(iter(recipes.values()))
    goal, arms = first.goals[-1], [*arms_of(first, first.name)]
    measure, units = _measure(goal)
    table = json.loads((stores[next(iter(recipes))].open(goal.name) / "table.json").read_text())
    families = list(dict.fromkeys(row["family"] for row in table["rows"]))
    samples = {
        (seed, arm, family): read_jsonl(stores[seed].open(goal.name) / "samples" / f"{arm}.{family}.jsonl", Sample)
        for seed in recipes
        for arm in arms
        for family in families
    }
    rows, differences = [], []
    for family in families:
        for arm in arms:
            runs = [summary(samples[seed, arm, family]) for seed in recipes]
            rows.append({"arm": arm, "family": family, **_over([run["mean"] for run in runs]), "by_seed": runs})
            if arm != arms[0]:
                pairs = [difference(samples[seed, arms[0], family], samples[seed, arm, family]) for seed in recipes]
                over = over_runs([pair["mean"] for pair in pairs])
                differences.append(
                    {"arm": arm, "against": arms[0], "family": family, **_over(over.runs), "by_seed": pairs}
                    | {"significant": over.excludes_zero and len(pairs) > 1}
                )
    costs = [_own_seconds(recipe, stores[seed]) for seed, recipe in recipes.items()]
    return {
        "measure": measure,
        "units": units,
        "arms": rows,
        "differences": differences,
        "processor_seconds": {arm: round(sum(cost[arm] for cost in costs) / len(costs), 1) for arm in arms},
    }


def _over(runs: Sequence[float]) -> dict[str, Any]:
    over: OverRuns = over_runs(runs)
    single = len(runs) == 1
    return {
        "mean": round(over.mean, 6),
        "low": None if single else round(over.low, 6),
        "high": None if single else round(over.high, 6),
    }


def _own_seconds(recipe: Recipe, store: LocalStore) -> dict[str, float]:
    """Processor seconds of the steps that an arm needs and not all arms do."""
    needed = {
        arm: {step.name for step in recipe.until(step.name)} for arm, step in arms_of(recipe, recipe.name).items()
    }
    shared = set.intersection(*needed.values())
    return {
        arm: sum(((store.manifest(name) or {})["timings"]["processor_seconds"] for name in names - shared), 0.0)
        for arm, names in needed.items()
    }


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown, below a heading that names the claim."""
    seeds = ", ".join(map(str, result["seeds"]))
    scale = "" if result["scale"] is None else f" --scale {result['scale']:g}"
    annotated = "" if result["annotated"] is None else f" --annotated {Path(result['annotated']).name}"
    lines = [
        f"## {result['claim']}",
        "",
        result["says"],
        "",
        *([result["told"], ""] if result["told"] else []),
        f"`upweight ablate {result['claim']} --seeds {len(result['seeds'])}{scale}{annotated}`, {result['date']}: "
        f"{result['measure']}, seeds {seeds}. Intervals are at 95%, with seeds as the units.",
        "",
        f"| on | arm | {' | '.join(f'seed {seed}' for seed in result['seeds'])} | mean | interval | CPU-s of its own |",
        f"| --- | --- |{' ---: |' * len(result['seeds'])} ---: | ---: | ---: |",
    ]
    for row in result["arms"]:
        runs = " | ".join(f"{run['mean']:.3f}" for run in row["by_seed"])
        cost = result["processor_seconds"][row["arm"]]
        lines.append(f"| {row['family']} | {row['arm']} | {runs} | {row['mean']:.3f} | {interval(row)} | {cost:.0f} |")
    lines += [
        "",
        f"| on | difference | {' | '.join(f'seed {seed}' for seed in result['seeds'])} | mean | interval |",
        f"| --- | --- |{' ---: |' * len(result['seeds'])} ---: | ---: |",
    ]
    for row in result["differences"]:
        runs = " | ".join(f"{run['mean']:+.3f}{'*' if run['significant'] else ''}" for run in row["by_seed"])
        pair = f"{row['arm']} - {row['against']}"
        lines.append(f"| {row['family']} | {pair} | {runs} | {row['mean']:+.3f} | {interval(row, '+')} |")
    lines += ["", f"\\* differs from zero within that run, with {result['units']} as the units.", ""]
    return "\n".join(lines)


def interval(row: Mapping[str, Any], sign: str = "") -> str:
    """Both ends, or that there are none."""
    return "one seed: none" if row["low"] is None else f"{row['low']:{sign}.3f} to {row['high']:{sign}.3f}"


def put_section(file: Path, name: str, text: str) -> None:
    """Put the section of a claim into a Markdown file, in place of the one that is there."""
    lines = (file.read_text().splitlines() if file.exists() else []) or ["# Evidence", ""]
    heading = f"## {name}"
    if heading in lines:
        start = lines.index(heading)
        end = next((place for place in range(start + 1, len(lines)) if lines[place].startswith("## ")), len(lines))
        lines[start:end] = [*text.splitlines(), ""]
    else:
        lines += [*([] if not lines[-1] else [""]), *text.splitlines()]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join(lines).rstrip("\n") + "\n")


def _print(result: Mapping[str, Any], console: Console) -> None:
    console.print(f"{result['claim']}: {result['says']}", highlight=False, markup=False)
    for heading in ("arm", "difference"):
        drawn = Table("on", heading, **NARROW)
        for figure in ("mean", "95% over seeds", *(["CPU-s of its own"] if heading == "arm" else [])):
            drawn.add_column(figure, justify="right", no_wrap=True)
        for row in result["arms"] if heading == "arm" else result["differences"]:
            sign = "" if heading == "arm" else "+"
            name = row["arm"] if heading == "arm" else f"{row['arm']} - {row['against']}"
            cost = [f"{result['processor_seconds'][row['arm']]:.0f}"] if heading == "arm" else []
            drawn.add_row(row["family"], name, f"{row['mean']:{sign}.3f}", interval(row, sign), *cost)
        console.print(drawn)
