"""Who watches a run: bars on a terminal, plain lines where there is none, and every recorded row in metrics.jsonl."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from upweight.app.trackers import Trackers
from upweight.core.work import Bar, Monitor

METRICS = "metrics.jsonl"
SPENT = ".spent.json"
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_BEATS = 2.0
RATE_WINDOW_SECONDS = 30.0
LONG_DAYS = 1000
NEXT_UNIT = 0.9995
"""From this share of a unit on three digits round up to it: 999,600 is 1M, not 1000k."""
NARROW: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False, "header_style": "underline"}
"""How tables are drawn: without lines, so that a plan fits 80 columns."""


class ConsoleMonitor(Monitor):
    """Watches one step.

    Time spent is noted every few seconds in the artifact, so that a run that was killed and resumed knows its whole
    cost.

    Args:
        console: a bar is drawn where this is a terminal; otherwise lines are printed, at most one in
            `seconds_between_lines` for each piece of work.
        out: the directory of the artifact.
        step: the name to print before each line.
        trackers: where recorded rows go besides metrics.jsonl.
    """

    def __init__(
        self,
        console: Console,
        out: Path,
        step: str,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        trackers: Trackers | None = None,
    ) -> None:
        self.console = console
        self.step = step
        self.seconds_between_lines = seconds_between_lines
        self.out = out
        self.trackers = trackers
        self.earlier_seconds, self.attempts = _spent(out / SPENT)
        self._began = time.monotonic()
        self._beat_at = -math.inf
        self._metrics: IO[str] | None = None
        self._progress: Progress | None = None
        self.beat()

    @property
    def seconds(self) -> float:
        """Spent on this artifact, in earlier attempts too."""
        return self.earlier_seconds + time.monotonic() - self._began

    def beat(self) -> None:
        """Note the time spent, at most every few seconds."""
        now = time.monotonic()
        if now - self._beat_at >= SECONDS_BETWEEN_BEATS:
            self._beat_at = now
            path = self.out / SPENT
            hidden = path.with_name(f"{path.name}.writing")
            hidden.write_text(json.dumps({"seconds": round(self.seconds, 1), "attempts": self.attempts}))
            hidden.replace(path)

    @contextmanager
    def track(self, label: str, *, total: float | int, unit: str, done: float | int = 0) -> Iterator[Bar]:
        bar: _DrawnBar | _PrintedBar
        if self.console.is_terminal:
            if self._progress is None:
                self._progress = _progress(self.console)
                self._progress.start()
            bar = _DrawnBar(self, self._progress, label, total, unit, done)
            try:
                yield bar
            finally:
                bar.close()
                if not self._progress.tasks:
                    self._progress.stop()
                    self._progress = None
        else:
            bar = _PrintedBar(self, label, total, unit, done)
            yield bar
            bar.close()

    def record(self, **metrics: Any) -> None:
        if self._metrics is None:
            self._metrics = _opened(self.out / METRICS)
        self._metrics.write(json.dumps(metrics, default=float) + "\n")
        self._metrics.flush()
        if self.trackers is not None:
            self.trackers.log(metrics)
        self.beat()

    def say(self, line: str) -> None:
        self.console.print(f"  {self.step}: {escape(line)}", highlight=False, soft_wrap=True)
        self.beat()

    def forget(self) -> None:
        """Remove the note of time spent: the work is complete."""
        (self.out / SPENT).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop drawing and close the metrics."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self.trackers is not None:
            self.trackers.close()


class _Pace:
    """Rate over the last half minute: the ETA follows a change of phase, and earlier attempts are no part of it."""

    def __init__(self, total: float | int, done: float | int) -> None:
        self.total = total
        self.done = done
        self.first = done
        self.began = time.monotonic()
        self.window: deque[tuple[float, float]] = deque([(self.began, done)])
        self.shown: Mapping[str, float | int] = {}

    def advance(self, amount: float | int, shown: Mapping[str, float | int]) -> None:
        now = time.monotonic()
        self.done += amount
        self.shown = {**self.shown, **shown}
        if now - self.window[-1][0] > RATE_WINDOW_SECONDS / 100:
            self.window.append((now, self.done))
        while len(self.window) > 2 and now - self.window[0][0] > RATE_WINDOW_SECONDS:
            self.window.popleft()

    @property
    def rate(self) -> float:
        """Units a second, 0 where nothing was done yet."""
        then, before = self.window[0]
        elapsed = time.monotonic() - then
        return (self.done - before) / elapsed if elapsed > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds left, None where the rate or the total is not known."""
        return (self.total - self.done) / self.rate if self.rate > 0 and self.total > self.done else None

    @property
    def progress(self) -> str:
        """How much of how much; a total of 0 is not known."""
        return f"{count(self.done)}/{count(self.total)}" if self.total else count(self.done)


class _PrintedBar(Bar):
    """Plain lines, few enough to read in a log."""

    def __init__(self, monitor: ConsoleMonitor, label: str, total: float | int, unit: str, done: float | int) -> None:
        self.monitor, self.label, self.unit = monitor, label, unit
        self.pace = _Pace(total, done)
        self.printed_at = time.monotonic()
        if done:
            monitor.say(f"{label}: going on at {count(done)} of {count(total)} {unit}")

    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        self.pace.advance(amount, shown)
        self.monitor.beat()
        if time.monotonic() - self.printed_at >= self.monitor.seconds_between_lines:
            self.printed_at = time.monotonic()
            self._line(finished=False)

    def close(self) -> None:
        if self.pace.done > self.pace.first:
            self._line(finished=True)

    def _line(self, finished: bool) -> None:
        pace = self.pace
        elapsed = max(time.monotonic() - pace.began, 1e-9)
        parts = [f"{pace.progress} {self.unit}"]
        rate = (pace.done - pace.first) / elapsed if finished else pace.rate
        parts.append(f"{count(rate)} {self.unit}/s")
        parts += [f"{name} {figure(value)}" for name, value in pace.shown.items()]
        if finished:
            parts.append(f"took {duration(elapsed)}")
        elif pace.eta is not None:
            parts.append(f"ETA {duration(pace.eta)}")
        self.monitor.say(f"{self.label}: {', '.join(parts)}")


class _DrawnBar(Bar):
    def __init__(
        self, monitor: ConsoleMonitor, progress: Progress, label: str, total: float | int, unit: str, done: float | int
    ) -> None:
        self.monitor, self.progress = monitor, progress
        self.pace = _Pace(total, done)
        self.task = progress.add_task(f"{monitor.step}: {label}", total=total or None, unit=unit, pace=self.pace)
        progress.update(self.task, completed=done)

    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        self.pace.advance(amount, shown)
        self.monitor.beat()
        self.progress.update(self.task, completed=self.pace.done)

    def close(self) -> None:
        if self.pace.done > self.pace.first:
            elapsed = time.monotonic() - self.pace.began
            shown = "".join(f", {name} {figure(value)}" for name, value in self.pace.shown.items())
            self.progress.print(
                f"  {escape(str(self.progress.tasks[self._index()].description))}: {count(self.pace.done)} "
                f"{self.progress.tasks[self._index()].fields['unit']} in {duration(elapsed)}{shown}",
                highlight=False,
            )
        self.progress.remove_task(self.task)

    def _index(self) -> int:
        return self.progress.task_ids.index(self.task)


class _Figures(ProgressColumn):
    """Amount, rate, ETA and what the stage shows."""

    def render(self, task: Task) -> Text:
        pace: _Pace = task.fields["pace"]
        unit = task.fields["unit"]
        parts = [f"{pace.progress} {unit}", f"{count(pace.rate)} {unit}/s"]
        if pace.eta is not None:
            parts.append(f"ETA {duration(pace.eta)}")
        parts += [f"{name} {figure(value)}" for name, value in pace.shown.items()]
        return Text("  ".join(parts))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=20),
        _Figures(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


def _opened(path: Path) -> IO[str]:
    """The metrics for appending; a last line that a kill cut short is removed first."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    return path.open("a")


def _spent(path: Path) -> tuple[float, int]:
    """Seconds and attempts of earlier runs of this artifact."""
    if not path.exists():
        return 0.0, 1
    try:
        earlier = json.loads(path.read_text())
        return float(earlier["seconds"]), int(earlier["attempts"]) + 1
    except ValueError:  # it is not flushed, so a power failure may leave it empty
        return 0.0, 2


def duration(seconds: float | int) -> str:
    """Seconds as a person says them: 0.4s, 12s, 3m05s, 2h10m, 3d04h, 12.5y."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    seconds = round(seconds)
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= LONG_DAYS * 86400:
        return f"{count(seconds / 86400 / 365.25)}y"
    return f"{int(seconds // 86400):,}d{int(seconds % 86400 // 3600):02d}h"


def count(value: float | int) -> str:
    """A count in three digits: 950, 21.5k, 4.00M, 6.5T."""
    for size, letter in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= NEXT_UNIT * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 10 or float(value).is_integer() else f"{value:.2g}"


def figure(value: float | int) -> str:
    """A figure beside a bar: four digits."""
    return f"{value:.4g}"


def size(size_bytes: float | int) -> str:
    """Bytes in decimal units, as disks are sold: 12 kB, 3.4 MB."""
    for unit, letter in ((1e18, "EB"), (1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= NEXT_UNIT * unit:
            return f"{size_bytes / unit:.3g} {letter}"
    return f"{size_bytes:.0f} B"
