"""What a recipe will cost, from the stages' own estimates and a machine: this one, measured, or any that is described.

    seconds = training flops / (speed x attained) + sampled flops / sampling speed + overhead

This machine: speed is the fastest matrix product of the model's width, measured in a fraction of a second; attained the
share of it that training and sampling reach here, since attention, norms, the optimizer and small batches leave the
multipliers idle, the less the wider the model is:

    attained = width / (width + half)          half: the width at which half of the speed is reached, measured

set against actual times in every report.

A described one (app/cluster.py): speed is the peak of its GPUs, sampling is bound by the bandwidth of their memory, and
training takes at least the time in which FSDP moves weights and gradients over the links:

    bytes a microbatch and GPU = 3 x 2 bytes x parameters     (gather for forward and backward, scatter of gradients)

Memory of a training step is 16 bytes a parameter (weights, gradients and two moments in float32), which FSDP divides by
the GPUs, two layers' worth of gathered weights, and the activations, of which recomputation keeps about a twentieth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from upweight.app.cluster import Cluster
from upweight.app.console import NARROW, count, duration, size
from upweight.app.environment import resident_memory_bytes
from upweight.app.recipe import Recipe, Step
from upweight.core.work import Estimate, Machine
from upweight.model.config import usual_width
from upweight.train.speed import peak_flops_per_second, plain_flops_per_second

HALF_TRAINED, HALF_SAMPLED = 128.0, 500.0
"""Measured on a CPU in float32 (docs/log.md): of training 0.5 at width 128 and 0.77 at 576; of decoding 0.15 to 0.2 at
width 128 and 256 rows, 0.4 at 576 and 32 rows."""
STATE_BYTES = 16
"""Weights, gradients and two moments in float32, for each parameter that is trained."""
GATHERED_SHARE = 1 / 8
"""Of the weights, in bfloat16, what FSDP holds gathered at once: two layers and the embeddings."""
KEPT_ACTIVATIONS = 1 / 20
"""Of a recomputed layer's activations, what is kept: its input, of about 20 tensors of its size."""
SAMPLING_ROWS = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """One step's cost on a machine; the memory is that of one process, or of one GPU."""

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
        return peak_flops_per_second(usual_width(parameters), self.machine.device, self._dtype)

    @property
    def _dtype(self) -> str:
        return "float32" if torch.device(self.machine.device).type == "cpu" else "bfloat16"

    def seconds(self, estimate: Estimate, parameters: float | int = 0) -> float:
        """How long work of this cost takes here. A step that makes no model computes with one of `parameters`."""
        if not estimate.flops:
            return estimate.seconds
        size = estimate.parameters or parameters
        speed, width = self.flops_per_second(size), usual_width(size)
        trained, sampled = estimate.flops - estimate.sampled_flops, estimate.sampled_flops
        beside = (trained * HALF_TRAINED + sampled * HALF_SAMPLED) / width
        # what is no product gains less from a faster library of products: by two quickstarts, the root (docs/log.md)
        slower = math.sqrt(speed * plain_flops_per_second(width, self.machine.device, self._dtype))
        return estimate.flops / speed + beside / slower + estimate.seconds


def estimates(recipe: Recipe) -> dict[str, Estimate]:
    """What each step is expected to cost, by step."""
    found: dict[str, Estimate] = {}
    for step in recipe.steps():
        inputs = {key: found[source.name] for key, source in step.inputs.items()}
        found[step.name] = step.stage.estimate(step.config, inputs)
    return found


def plan(recipe: Recipe, machine: Machine, cluster: Cluster | None = None) -> list[Planned]:
    """Every step's cost, in order: on this machine, where memory includes what this process holds already; or on
    `cluster`, of which `machine` says how a model is spread (`sharding`, `recompute`)."""
    costs: Mapping[str, Estimate] = estimates(recipe)
    if cluster is not None:
        return [_on_cluster(step, costs[step.name], machine, cluster) for step in recipe.steps()]
    speed, base = Speed(machine), resident_memory_bytes()
    planned = []
    for step in recipe.steps():
        cost = costs[step.name]
        used = max((costs[source.name].parameters for source in step.inputs.values()), default=0)
        whole = replace(cost, memory_bytes=cost.memory_bytes + base)
        planned.append(Planned(step.name, step.stage_name, whole, speed.seconds(cost, used)))
    return planned


def _on_cluster(step: Step, cost: Estimate, machine: Machine, cluster: Cluster) -> Planned:
    state = float(STATE_BYTES * cost.parameters)
    trains = cost.parameters > 0 and cost.memory_bytes >= state
    memory = _memory_of_a_gpu(cost, state, machine, cluster) if trains else cost.memory_bytes
    again = 1.0 + machine.recompute / 3 if trains else 1.0
    computed = (cost.flops - cost.sampled_flops) * again / cluster.training_flops_per_second()
    moved = _moving_seconds(step.config, cost, machine, cluster) if trains else 0.0
    sampled = cost.sampled_flops / cluster.sampling_flops_per_second(SAMPLING_ROWS)
    seconds = max(computed, moved) + sampled + cost.seconds
    return Planned(step.name, step.stage_name, replace(cost, memory_bytes=memory), seconds)


def _memory_of_a_gpu(cost: Estimate, state: float | int, machine: Machine, cluster: Cluster) -> float:
    # the stages estimate activations in float32; on a GPU they are kept in bfloat16
    activations = (cost.memory_bytes - state) / 2
    activations *= (1.0 - machine.recompute) + machine.recompute * KEPT_ACTIVATIONS
    if machine.sharding == "replicated" or cluster.count == 1:
        return state + 2 * cost.parameters + activations
    return state / cluster.count + 2 * cost.parameters * GATHERED_SHARE + activations


def _moving_seconds(config: Any, cost: Estimate, machine: Machine, cluster: Cluster) -> float:
    """What the links need for the weights and gradients of all microbatches, or steps where the model is replicated."""
    shared = machine.sharding == "fsdp"
    at_once = float(getattr(config, "microbatch_tokens" if shared else "batch_tokens", 0))
    if cluster.count == 1 or not at_once:
        return 0.0
    passes = cost.tokens / (at_once * cluster.count if shared else at_once)
    return passes * (3 if shared else 2) * 2.0 * cost.parameters / cluster.link


def print_plan(
    recipe: Recipe,
    machine: Machine,
    price_per_hour: float = 0.0,
    cluster: Cluster | None = None,
    console: Console | None = None,
) -> None:
    """The plan as a table, with totals."""
    console = console or Console()
    if machine.threads:
        torch.set_num_threads(machine.threads)
    planned = plan(recipe, machine, cluster)
    where = machine.device if cluster is None else f"{cluster.count:,} x {cluster.name} ({machine.sharding})"
    table = Table(title=f"plan of {recipe.name} on {where}", title_justify="left", **NARROW)
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
    for line in _remarks(planned, seconds, price_per_hour, cluster):
        console.print(line, highlight=False, soft_wrap=True)


def _remarks(planned: list[Planned], seconds: float, price_per_hour: float, cluster: Cluster | None) -> list[str]:
    """Money, and what does not fit."""
    hours = seconds / 3600
    if cluster is None:
        cost = hours * price_per_hour
        return [f"about {_amount(cost)} at {price_per_hour:,.2f} an hour"] if price_per_hour else []
    used, price = hours * cluster.count, cluster.price_per_hour
    told = [f"{_amount(used)} GPU-hours at {cluster.attained:.0%} of the peak of {cluster.name}"]
    if price:
        told.append(f"about {_amount(used * price)} at {price:,.2f} an hour and GPU")
    large = [item.step for item in planned if item.estimate.memory_bytes > cluster.memory_bytes]
    if large:
        told.append(
            f"{', '.join(large)}: more than the {size(cluster.memory_bytes)} of a {cluster.name}. Share the model out "
            "(--sharding fsdp), recompute activations (--recompute 1), or take a smaller microbatch"
        )
    return told


def _amount(value: float) -> str:
    """Whole from 100 on; below, hundredths, and of less than these two digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _count(value: float | int) -> str:
    return count(value) if value else "-"
