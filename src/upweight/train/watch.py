"""Watching a run: each step's report goes to the progress bar and to metrics.jsonl as it passes through."""

import resource
from collections.abc import Iterator
from itertools import chain

import torch

from upweight.core.work import Machine, Monitor
from upweight.train import parallel
from upweight.train.speed import WIDEST, peak_flops_per_second
from upweight.train.trainer import StepReport


def watched(
    reports: Iterator[StepReport],
    monitor: Monitor,
    label: str,
    *,
    total: float | int,
    unit: str,
    machine: Machine | None = None,
    dtype: str = "float32",
) -> Iterator[StepReport]:
    """Pass `reports` through, showing and recording each.

    Recorded beside the report: tokens a second, peak memory, the share of each source, and the model's utilisation
    ("mfu"): its operations as a share of what the matrix products of this machine reach.

    Args:
        total, unit: the length of the timeline and what it counts (tokens, steps). The bar starts where an earlier run
            came to, so that rate and ETA are this run's.
        machine, dtype: what utilisation is measured against; without a machine it is left out.
    """
    first = next(reports, None)
    if first is None:
        return
    with monitor.track(label, total=total, unit=unit, done=first.began) as bar:
        for report in chain((first,), reports):
            bar.advance(report.consumed - report.began, loss=report.loss)
            monitor.record(
                step=report.step,
                consumed=report.consumed,
                phase=report.phase,
                learning_rate=report.learning_rate,
                loss=report.loss,
                gradient_norm=report.gradient_norm,
                tokens=report.tokens,
                seconds=report.seconds,
                **report.terms,
                tokens_per_second=report.tokens / report.seconds,
                peak_memory_bytes=_peak_memory(machine),
                **_utilisation(report, machine, dtype),
                **{f"share/{source}": share for source, share in report.shares.items()},
            )
            yield report


def _utilisation(report: StepReport, machine: Machine | None, dtype: str) -> dict[str, float]:
    if machine is None or not report.flops:
        return {}
    peak = peak_flops_per_second(WIDEST, machine.device, dtype) * parallel.world().size
    return {"mfu": report.flops / (report.seconds * peak)}


def _peak_memory(machine: Machine | None) -> int:
    """Of the device where it has memory of its own, else of this process."""
    if machine is not None and machine.device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(machine.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
