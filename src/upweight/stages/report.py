"""report: one self-contained HTML page about every step of the recipe that is given as an input.

Timings, memory and environment are read from the manifests of the inputs; they are shown and change no identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.ledger import ledger_of
from upweight.evals.page import render_page
from upweight.store.artifact import MANIFEST, read_manifest, write_whole

REPORT = "report.html"


@dataclass(frozen=True)
class Config:
    """Attributes:
    title: the heading of the page.
    """

    title: str = "upweight"


def run(config: Config, work: Work) -> Summary:
    """Write `report.html`."""
    if not work.inputs:
        raise UserError("the report has no inputs: give it the steps to report on")
    path = work.out / REPORT
    write_page(work.inputs, path, title=config.title)
    return {"bytes": path.stat().st_size, "steps": len(work.inputs)}


def write_page(inputs: Mapping[str, Path], path: Path, *, title: str, again_seconds: int = 0) -> None:
    """The page about the artifacts `inputs`, complete or still being built, all at once into `path`."""
    complete = [read_manifest(found / MANIFEST) for found in inputs.values() if (found / MANIFEST).exists()]
    write_whole(path, render_page(inputs, title, ledger_of(complete), again_seconds=again_seconds))


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Reading and drawing take about a tenth of a second a step."""
    return Estimate(disk_bytes=2e6, memory_bytes=1e8, seconds=1.0 + 0.1 * len(inputs))
