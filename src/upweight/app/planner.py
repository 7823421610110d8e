"""What a recipe will cost, from the stages' own estimates and one measurement of this machine.

    seconds = flops / (speed x ATTAINED) + overhead

speed: the fastest matrix product of the model's width, measured in a fraction of a second. ATTAINED: the share of it
that training and sampling reach here, since attention, norms, the optimizer and small batches leave the multipliers
idle; a measured constant, set against actual times in every report.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from upweight.app.console import NARROW, count, duration, size
from upweight.app.environment import resident_memory_bytes
from upweight.app.recipe import Recipe
from upweight.core.work import Estimate, Machine
from upweight.train.speed import peak_flops_per_second

ATTAINED = 0.5
PARAMETERS_A_WIDTH_SQUARED = 48
"""A transformer of width w and 4 layers has about 12 x 4 x w^2 parameters, which gives the width for a count."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One step's cost on this machine."""

    step: str
    stage: str
    estimate: Estimate
    seconds: float


class Speed:
    """How fast this machine computes, by the size of the model."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def flops_per_second(self, parameters: float | int) -> float:
        """The speed at the width of a model of so many parameters."""
        dtype = "float32" if torch.device(self.machine.device).type == "cpu" else "bfloat16"
        return peak_flops_per_second((parameters / PARAMETERS_A_WIDTH_SQUARED) ** 0.5, self.machine.device, dtype)

    def seconds(self, estimate: Estimate) -> float:
        """How long work of this cost takes here."""
        computing = estimate.flops / (ATTAINED * self.flops_per_second(estimate.parameters)) if estimate.flops else 0.0
        return computing + estimate.seconds


def estimates(recipe: Recipe) -> dict[str, Estimate]:
    """What each step is expected to cost, by step."""
    found: dict[str, Estimate] = {}
    for step in recipe.steps():
        inputs = {key: found[source.name] for key, source in step.inputs.items()}
        found[step.name] = step.stage.estimate(step.config, inputs)
    return found


def plan(recipe: Recipe, machine: Machine) -> list[Planned]:
    """Every step's cost on this machine, in order; memory includes what this process holds already."""
    speed, base = Speed(machine), resident_memory_bytes()
    costs: Mapping[str, Estimate] = estimates(recipe)
    return [
        Planned(
            step.name,
            step.stage_name,
            replace(costs[step.name], memory_bytes=costs[step.name].memory_bytes + base),
            speed.seconds(costs[step.name]),
        )
        for step in recipe.steps()
    ]


def print_plan(recipe: Recipe, machine: Machine, price_per_hour: float = 0.0, console: Console | None = None) -> None:
    """The plan as a table, with totals."""
    console = console or Console()
    if machine.threads:
        torch.set_num_threads(machine.threads)
    planned = plan(recipe, machine)
    table = Table(title=f"plan of {recipe.name} on {machine.device}", title_justify="left", **NARROW)
    for heading in ("step", "stage"):
        table.add_column(heading, no_wrap=True)
    for heading in ("weights", "tokens", "FLOPs", "memory", "disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in planned:
        cost = item.estimate
        table.add_row(
            item.step,
            item.stage,
            _count(cost.parameters),
            _count(cost.tokens),
            _count(cost.flops),
            size(cost.memory_bytes),
            size(cost.disk_bytes),
            duration(item.seconds),
        )
    seconds = sum(item.seconds for item in planned)
    table.add_section()
    table.add_row(
        "total",
        "",
        "",
        _count(sum(item.estimate.tokens for item in planned)),
        _count(sum(item.estimate.flops for item in planned)),
        size(max(item.estimate.memory_bytes for item in planned)),
        size(sum(item.estimate.disk_bytes for item in planned)),
        duration(seconds),
    )
    console.print(table)
    if price_per_hour:
        console.print(f"about {seconds / 3600 * price_per_hour:,.2f} at {price_per_hour:,.2f} an hour", highlight=False)


def _count(value: float | int) -> str:
    return count(value) if value else "-"
