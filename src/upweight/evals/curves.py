"""Curves of a run: what metrics.jsonl recorded, as bokeh figures with the phases of the timeline shaded."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from bokeh.models.annotations import BoxAnnotation, Label, Title, Whisker
from bokeh.plotting import figure

Point = tuple[float | int, float | int]
Stretch = tuple[str, float | int, float | int]

COUNTERS = ("step", "rollout_step")
PLACES = ("consumed",)
AXES = {"consumed": "tokens consumed"}
UNINTERESTING = ("tokens", "seconds", "phase", *COUNTERS, *PLACES)
FIRST = ("loss", "reward", "accuracy", "learning_rate")
SCHEDULED = ("learning_rate",)
MOST_FIGURES = 9
MOST_POINTS = 400
SMOOTHED_SHARE = 0.05
HEIGHT = 240
INK, PALE = "#1f5fa8", "#9dbbe0"
SHADES = ("#eef2f7", "#ffffff")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Of a step that a resumed run recorded twice the later row counts."""
    if not path.exists():
        return []
    rows: dict[tuple[str, object], dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that is being written, or that a kill cut short
            continue
        counter = next((name for name in COUNTERS if name in row), "")
        rows[counter, row.get(counter, number)] = row
    return list(rows.values())


def curves(rows: Sequence[Mapping[str, Any]]) -> list[figure]:
    """One figure for each recorded quantity, those that matter most first."""
    found: list[tuple[int, figure]] = []
    for counter in COUNTERS:
        group = [row for row in rows if counter in row]
        if len(group) < 2:
            continue
        across = "consumed" if all("consumed" in row for row in group) else counter
        names = dict.fromkeys(name for row in group for name, value in row.items() if _is_number(value))
        for name in names:
            points = [(row[across], row[name]) for row in group if _is_number(row.get(name))]
            if name not in UNINTERESTING and len(points) > 1 and len({value for _, value in points}) > 1:
                rank = FIRST.index(name) if name in FIRST else len(FIRST)
                found.append((rank, _curve(name, across, points, _phases(group, across))))
    return [made for _, made in sorted(found, key=lambda item: item[0])][:MOST_FIGURES]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _phases(rows: Sequence[Mapping[str, Any]], across: str) -> list[Stretch]:
    """Name, begin and end of each run of rows of one phase."""
    found: list[Stretch] = []
    for row in rows:
        if "phase" not in row:
            continue
        if found and found[-1][0] == row["phase"]:
            found[-1] = (row["phase"], found[-1][1], row[across])
        else:
            found.append((row["phase"], found[-1][2] if found else 0, row[across]))
    return found


def _curve(name: str, across: str, points: Sequence[Point], phases: Sequence[Stretch]) -> figure:
    kept = points[:: math.ceil(len(points) / MOST_POINTS)]
    kept = [*kept, points[-1]] if kept[-1] is not points[-1] else kept
    source = ColumnDataSource({"x": [x for x, _ in kept], "raw": [y for _, y in kept], "mean": _smooth(kept, name)})
    made = _empty(name.replace("_", " "), AXES.get(across, across.replace("_step", " step")))
    for index, (phase, begin, end) in enumerate(phases):
        made.add_layout(
            BoxAnnotation(left=begin, right=end, fill_color=SHADES[index % 2], fill_alpha=1.0, level="image")
        )
        if len(phases) > 1:
            label = Label(x=begin, y=4 + 12 * (index % 3), y_units="screen", text=f" {phase}")
            label.text_font_size, label.text_color = "10px", "#667383"
            made.add_layout(label)
    made.line("x", "raw", source=source, color=PALE, line_width=1)
    made.line("x", "mean", source=source, color=INK, line_width=2)
    made.add_tools(HoverTool(tooltips=[(across, "@x{0,0}"), (name, "@raw{0.0000}")], mode="vline"))
    if max(abs(x) for x, _ in kept) >= 1e4:
        made.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    return made


def _smooth(points: Sequence[Point], name: str) -> list[float]:
    """The mean of each point and those close before it, to show the trend through the noise; a schedule has none."""
    reach = 1 if name in SCHEDULED else max(1, round(len(points) * SMOOTHED_SHARE))
    values = [value for _, value in points]
    return [math.fsum(values[max(0, end - reach) : end]) / min(end, reach) for end in range(1, len(values) + 1)]


def _empty(title: str, across: str, **given: Any) -> figure:
    made = figure(
        title=Title(text=title, text_font_size="13px"),
        x_axis_label=across,
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="xpan,xwheel_zoom,reset",
        toolbar_location=None,
        **given,
    )
    made.grid.grid_line_color = "#e3e7ec"
    made.outline_line_color = None
    return made


def intervals(family: str, rows: Sequence[Mapping[str, Any]]) -> figure:
    """The checkpoints of one family of problems: means with their 95% intervals."""
    names = [row["checkpoint"] for row in rows]
    source = ColumnDataSource(
        {
            "checkpoint": names,
            "mean": [row["mean"] for row in rows],
            "low": [row["mean"] if row["low"] is None else row["low"] for row in rows],
            "high": [row["mean"] if row["high"] is None else row["high"] for row in rows],
        }
    )
    made = _empty(f"avg@{rows[0]['k']} on {family}", "", x_range=names)
    highest = max(max(source.data["high"]), 0.01)
    most = max(1.0, *source.data["mean"])  # scores end at 1; bits per byte do not
    made.y_range = Range1d(min(0.0, min(source.data["low"])), min(most, highest) * 1.08)
    made.vbar(x="checkpoint", top="mean", width=0.6, color=PALE, source=source)
    made.add_layout(
        Whisker(base="checkpoint", lower="low", upper="high", source=source, line_color=INK, level="overlay")
    )
    made.add_tools(HoverTool(tooltips=[("", "@checkpoint: @mean{0.000} [@low{0.000}, @high{0.000}]")]))
    if len(names) > 4:
        made.xaxis.major_label_orientation = math.pi / 4
    return made
