"""One step of several objectives in processes laid out in several ways: run by test_01_layouts in a process of its own.

    layout_worker.py FOLDER

It forks the processes of each layout, so that torch is imported once. Each writes what it ended with.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp  # here, so that no child has to
from forked import together
from objective_cases import VOCABULARY, Case, cases, one_step
from torch import nn

from upweight.core.work import Machine
from upweight.model.heads import ScalarHead
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.train import parallel

SHAPE = ModelConfig(
    vocab_size=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, ffn=24, qk_norm=True, qkv_bias=True, tied=False
)
TIED = dataclasses.replace(SHAPE, tied=True, qk_norm=False, qkv_bias=False)
LAYOUTS: Mapping[str, tuple[int, Machine]] = {
    "tensor": (2, Machine(tensor=2)),
    "context": (2, Machine(context=2)),
    "data and tensor": (4, Machine(tensor=2)),
    "data and context": (4, Machine(context=2)),
    "context alone": (4, Machine(context=4)),
    "context and tensor": (4, Machine(context=2, tensor=2)),
    "fsdp over context": (4, Machine(context=2, sharding="fsdp")),
    "fsdp and tensor": (4, Machine(tensor=2, sharding="fsdp")),
}
KINDS = {"NextToken z": "muon", "NextToken": "adamw", "Dpd": "adamw", "Grpo sharing prompts": "adamw"}


def lively(shape: ModelConfig) -> Transformer:
    """A model whose losses are not all the same."""
    model = make_model(shape, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
            parameter.mul_(2.0)
    return model


def scorer() -> nn.Module:
    model = ScalarHead(lively(SHAPE))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def chosen() -> dict[str, tuple[Case, Any]]:
    """Cases by name with the optimizer, on models whose heads can be shared out."""
    found = cases()
    made: dict[str, tuple[Case, Any]] = {
        name: (dataclasses.replace(found[name], policy=lambda: lively(SHAPE)), kind) for name, kind in KINDS.items()
    }
    made["BradleyTerry"] = (dataclasses.replace(found["BradleyTerry"], policy=scorer), "adamw")
    made["tied"] = (dataclasses.replace(found["NextToken"], policy=lambda: lively(TIED)), "adamw")
    return made


def step(machine: Machine, file: str) -> Callable[[int], None]:
    """What each process does: a step of each case on its share of the items."""

    def work(rank: int) -> None:
        results = {}
        reader = parallel.readers()
        for name, (case, kind) in chosen().items():
            mine = case.items[reader.rank :: reader.size]
            batches = [case.make(mine[:1], 256), case.make(mine[1:], 40)]
            report, weights = one_step(case, batches, kind=kind, machine=machine)
            results[name] = (report.loss, report.weight, report.gradient_norm, weights)
        torch.save(results, f"{file} {rank}.pt")

    return work


def main() -> None:
    folder = Path(sys.argv[1])
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # imports for two seconds: once will do
    for name, (size, machine) in LAYOUTS.items():
        if not together(size, machine, step(machine, f"{folder}/{name}")):
            raise SystemExit(f"a process of the layout {name} was killed")


if __name__ == "__main__":
    main()
