"""Progress is readable in a log and on a terminal, and what was recorded can be read back."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from upweight.app.console import ConsoleMonitor, count, duration, size


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    monitor = ConsoleMonitor(console, tmp_path, "pretrain", seconds_between_lines=0.0)
    with monitor.track("phase 1", total=100, unit="tokens") as bar:
        bar.advance(25, loss=2.5)
        bar.advance(75, loss=1.25)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("  pretrain: phase 1: 25/100 tokens, ")
    assert "loss 2.5" in lines[0]
    assert "ETA" in lines[0]
    assert "100/100 tokens" in lines[-1]
    assert "took" in lines[-1]
    assert "\x1b" not in console.file.getvalue()


def test_few_lines(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    monitor = ConsoleMonitor(console, tmp_path, "pretrain", seconds_between_lines=60.0)
    with monitor.track("phase 1", total=1000, unit="tokens") as bar:
        for _ in range(1000):
            bar.advance()
    assert len(console.file.getvalue().splitlines()) == 1


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    monitor = ConsoleMonitor(console, tmp_path, "pretrain")
    with monitor.track("phase 1", total=100, unit="tokens", done=50) as bar:
        bar.advance(50, loss=2.5)
    monitor.close()
    assert "50/100 tokens" in console.file.getvalue()
    assert "loss 2.5" in console.file.getvalue()


def test_recorded_rows_are_appended_after_a_kill(tmp_path: Path) -> None:
    first = ConsoleMonitor(Console(file=io.StringIO()), tmp_path, "sft")
    first.record(step=1, loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "los')
    second = ConsoleMonitor(Console(file=io.StringIO()), tmp_path, "sft")
    second.record(step=2, loss=1.0)
    assert second.attempts == 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize("left", ["", "\0" * 40, '{"seconds": 3'])
def test_a_note_that_a_power_failure_has_spoiled_does_not_stop_the_next_run(tmp_path: Path, left: str) -> None:
    (tmp_path / ".spent.json").write_text(left)
    monitor = ConsoleMonitor(Console(file=io.StringIO()), tmp_path, "base")
    assert monitor.attempts == 2
    monitor.close()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.44, "0.4s"),
        (9.97, "10s"),
        (12, "12s"),
        (59.7, "1m00s"),
        (185, "3m05s"),
        (3599.9, "1h00m"),
        (7800, "2h10m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_counts_and_sizes() -> None:
    assert [count(value) for value in (0, 950, 21_500, 4e6, 6.5e12, 0.25)] == [
        "0",
        "950",
        "21.5k",
        "4M",
        "6.5T",
        "0.25",
    ]
    assert [size(value) for value in (12, 3_400_000)] == ["12 B", "3.4 MB"]


def test_no_figure_has_four_digits() -> None:
    assert [count(value) for value in (999.4, 999_499, 999_600, 999_999_999)] == ["999", "999k", "1M", "1G"]
    assert [size(value) for value in (999_499, 999_600, 999_600e12)] == ["999 kB", "1 MB", "1 EB"]
