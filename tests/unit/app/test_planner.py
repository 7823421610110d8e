"""The plan adds up, and larger work takes longer."""

import io

from rich.console import Console
from small_stages import Count, Total

from upweight.app.planner import ATTAINED, Speed, plan, print_plan
from upweight.app.recipe import Recipe, Step
from upweight.core.work import Estimate, Machine

NUMBERS = Step("numbers", Count, Count.Config(to=1000))
RECIPE = Recipe("r", Step("total", Total, Total.Config(), {"numbers": NUMBERS}))


def test_seconds_are_flops_by_speed_and_overhead() -> None:
    speed = Speed(Machine())
    fast = speed.flops_per_second(1e6)
    assert fast > 1e8
    assert speed.flops_per_second(1e6) == fast  # measured once
    assert speed.seconds(Estimate(flops=fast, seconds=2.0, parameters=1e6)) == 1 / ATTAINED + 2.0
    assert speed.seconds(Estimate()) == 0.0


def test_estimates_flow_from_inputs() -> None:
    planned = {item.step: item.estimate for item in plan(RECIPE, Machine())}
    assert planned["numbers"].flops == 1e12
    assert planned["total"].tokens == planned["numbers"].tokens == 1000


def test_the_table() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(RECIPE, Machine(), price_per_hour=3600.0, console=console)
    printed = console.file.getvalue()
    assert "1k" in printed
    assert "1T" in printed
    assert "total" in printed
    assert "at 3,600.00 an hour" in printed
