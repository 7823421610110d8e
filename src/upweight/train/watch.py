"""Watching a run: each step's report goes to the progress bar and to metrics.jsonl as it passes through."""

from collections.abc import Iterator

from upweight.core.work import Monitor
from upweight.train.trainer import StepReport


def watched(
    reports: Iterator[StepReport], monitor: Monitor, label: str, *, total: float | int, unit: str, done: float | int = 0
) -> Iterator[StepReport]:
    """Pass `reports` through, showing and recording each.

    Args:
        total, unit: the length of the timeline and what it counts (tokens, steps).
        done: how far an earlier run came; the bar starts there.
    """
    with monitor.track(label, total=total, unit=unit, done=done) as bar:
        before = done
        for report in reports:
            bar.advance(report.consumed - before, loss=report.loss)
            before = report.consumed
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
            )
            yield report
