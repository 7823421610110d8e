"""Small sharded runs that are killed, or go on otherwise laid out: run by test_06_sharded in a process of its own.

    sharded_worker.py FOLDER

As in resume_worker.py, an event of a run kills it: here one of two processes dies, and the other is killed with it, as
torchrun does. One process forks all of them, so that torch is imported once.
"""

import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # both here, so that no child has to
from forked import together
from resume_worker import prepare, run, watch

from upweight.core.work import Machine
from upweight.objectives.next_token import NextToken

FSDP = Machine(sharding="fsdp")
EVENTS = 460
"""What one of two processes has in an uninterrupted run: most are the tensors that a checkpoint writes."""
STOPPED_AT = 7
OTHERWISE: Mapping[str, tuple[int, Machine]] = {
    "one process": (1, Machine()),
    "replicated": (2, Machine()),
    "tensor": (2, Machine(tensor=2)),
    "context": (2, Machine(context=2)),
    "four": (4, FSDP),
    "fsdp and tensor": (4, Machine(tensor=2, sharding="fsdp")),
}
BACK = ("tensor", "fsdp and tensor")
"""Layouts that are stopped in turn and taken up by one process."""


def killed(folder: Path, name: str, deaths: list[int]) -> None:
    """A run of two processes that dies at each of these events of one of them, then comes to its end."""
    (folder / name).mkdir()
    for number, fatal in enumerate([*deaths, 0]):

        def work(rank: int, number: int = number, fatal: int = fatal) -> None:
            told = watch(fatal if rank == number % 2 else 0)
            weights, _ = run(folder, folder / name / "checkpoints", folder / name / f"log{rank}", machine=FSDP)
            (folder / name / f"weights{rank}").write_text(f"{weights} {told()}")

        if together(2, FSDP, work):
            return


def taken_up(folder: Path, source: str, name: str, size: int, machine: Machine, stop: int = 0) -> None:
    """A run goes on from what `source` left, with so many processes."""
    if source:
        shutil.copytree(folder / source, folder / name)
    else:
        (folder / name).mkdir()

    def work(rank: int) -> None:
        place: dict[str, Any] = {"objective": NextToken(), "machine": machine, "stop": stop}
        _, model = run(folder, folder / name / "checkpoints", folder / name / f"log{rank}", **place)
        if not stop:
            torch.save(model.state_dict(), folder / name / f"weights{rank}.pt")

    if not together(size, machine, work):
        raise SystemExit(f"the run {name} was killed")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports for two seconds: once will do
    prepare(folder)
    draw = random.Random(0)
    killed(folder, "straight", [])
    killed(folder, "killed", [draw.randint(20, EVENTS // 2) for _ in range(6)])
    taken_up(folder, "", "whole", 1, Machine())
    taken_up(folder, "", "stopped", 2, FSDP, STOPPED_AT)
    for name, (size, machine) in OTHERWISE.items():
        taken_up(folder, "stopped", name, size, machine)
    for name in BACK:
        taken_up(folder, "", f"{name}, stopped", *OTHERWISE[name], STOPPED_AT)
        taken_up(folder, f"{name}, stopped", f"{name}, back", 1, Machine())


if __name__ == "__main__":
    main()
