"""What a recipe will cost, from the stages' own estimates and one measurement of this machine.

    seconds = flops / (speed x ATTAINED) + overhead

speed: the fastest matrix product of the model's width, measured in a fraction of a second. ATTAINED: the share of it
that training and sampling reach here, since attention, norms, the optimizer and small batches leave the multipliers
idle; a measured constant, set against actual times in every report.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from upweight.app.console import NARROW, count, duration, size
from upweight.app.environment import resident_memory_bytes
from upweight.app.recipe import Recipe
from upweight.core.work import Estimate, Machine

ATTAINED = 0.5
MEASURED_SECONDS = 0.25
ROWS = 4096
PRODUCTS = 8
NARROWEST, WIDEST = 64, 4096
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
    """Matrix products of this machine, measured once for each width that is asked for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._measured: dict[int, float] = {}

    def flops_per_second(self, parameters: float | int) -> float:
        """The speed at the width of a model of so many parameters."""
        width = 2 ** round(math.log2(max(NARROWEST, min(WIDEST, (parameters / PARAMETERS_A_WIDTH_SQUARED) ** 0.5))))
        if width not in self._measured:
            self._measured[width] = _matmul_speed(width, self.machine)
        return self._measured[width]

    def seconds(self, estimate: Estimate) -> float:
        """How long work of this cost takes here."""
        computing = estimate.flops / (ATTAINED * self.flops_per_second(estimate.parameters)) if estimate.flops else 0.0
        return computing + estimate.seconds


def _matmul_speed(width: int, machine: Machine) -> float:
    """Operations a second of [ROWS width] x [width 4 width], the largest product of a layer, the best of several.

    On a CPU by processor time: other work on the machine slows the run, but is no part of the plan.
    """
    device = torch.device(machine.device)
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    left = torch.ones(ROWS, width, device=device, dtype=dtype)
    right = torch.ones(width, 4 * width, device=device, dtype=dtype)
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < MEASURED_SECONDS:
        start = clock()
        for _ in range(PRODUCTS):
            product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, (clock() - start) / (PRODUCTS * threads))
    return 2 * ROWS * width * 4 * width / best


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
