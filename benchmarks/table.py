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


def put(rows: Sequence[Row], file: Path, below: str) -> None:
    """Put the rows into the table of one section of `file`, at its end where they are new.

    Args:
        below: the heading of the section; a section or table that is not there is begun.
    """
    lines = file.read_text().splitlines()
    if below not in lines:
        lines += ["", below, ""]
    start = lines.index(below) + 1
    section = lines[start : next((at for at in range(start, len(lines)) if lines[at].startswith("## ")), len(lines))]
    rest = lines[start + len(section) :]
    if HEAD not in section:
        section = [*section, HEAD, RULE, *([""] if rest else [])]
    for row in rows:
        line = row.line()
        key = line.split("|")[1:3]
        first = section.index(HEAD) + 2
        end = first
        while end < len(section) and section[end].startswith("|"):
            end += 1
        same = [place for place in range(first, end) if section[place].split("|")[1:3] == key]
        if same:
            section[same[0]] = line
        else:
            section.insert(end, line)
    file.write_text("\n".join([*lines[:start], *section, *rest]) + "\n")


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
