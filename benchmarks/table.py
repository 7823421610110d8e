"""The table of docs/benchmarks.md: a row is replaced where the same work was measured against the same peer again."""

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contest import Ratio

HEAD = "| work | peer | upweight against the peer | ratio (lowest-highest) | command | machine | date |"
RULE = "| --- | --- | --- | ---: | --- | --- | --- |"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured ratio."""

    work: str
    peer: str
    figures: str
    ratio: Ratio
    command: str
    machine: str
    dtype: str

    def line(self) -> str:
        """As a row of the table."""
        today = datetime.date.today().isoformat()
        work = f"{self.work}, {self.dtype}"
        cells = (work, self.peer, self.figures, str(self.ratio), f"`{self.command}`", self.machine, today)
        return f"| {' | '.join(cells)} |"


def put(rows: Sequence[Row], file: Path, below: str = "") -> None:
    """Put the rows into the table of `file`, at its end where they are new.

    Args:
        below: the heading below which the table stands; "" takes the first table.
    """
    lines = file.read_text().splitlines()
    if below and below not in lines:
        lines += ["", below, "", HEAD, RULE]
    start = lines.index(below) if below else 0
    if HEAD not in lines[start:]:
        lines += ["", HEAD, RULE]
    for row in rows:
        line = row.line()
        key = line.split("|")[1:3]
        first = lines.index(HEAD, start) + 2
        end = first
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        same = [place for place in range(first, end) if lines[place].split("|")[1:3] == key]
        if same:
            lines[same[0]] = line
        else:
            lines.insert(end, line)
    file.write_text("\n".join(lines) + "\n")


def machine() -> str:
    """The processor and torch, in few words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    has = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512_BF16": torch.cpu._is_avx512_bf16_supported()}
    kinds = ", ".join(kind for kind, there in has.items() if there) or "no bfloat16 instructions"
    return f"{model} ({kinds}), 1 thread, torch {torch.__version__.split('+')[0]}"
