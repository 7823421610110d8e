"""A recipe of two steps for test_several_processes: one that the first process builds, and one that all train."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.core.packing import pack, strip
from upweight.core.work import Estimate, Work
from upweight.model.config import ModelConfig
from upweight.model.transformer import make_model
from upweight.model.weights import save
from upweight.objectives.next_token import NextToken
from upweight.train import parallel
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.loader import EpochLoader
from upweight.train.timeline import constant
from upweight.train.trainer import train

SHAPE = ModelConfig(vocab_size=12, width=8, layers=2, heads=2, kv_heads=1, ffn=16)


@dataclass(frozen=True)
class Nothing:
    pass


class Write:
    """Sequences to train on."""

    Config = Nothing

    def run(self, config: Any, work: Work) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, 12, (3 + index,), generator=generator).tolist() for index in range(16)]
        (work.out / "rows.json").write_text(json.dumps(rows))
        return {"world": parallel.world().size, "rank": os.environ.get("RANK", "0")}

    def estimate(self, config: Any, inputs: Any) -> Estimate:
        return Estimate()


class Fit:
    """A tiny model on them, by all processes; `FAIL` in the environment names the process that refuses."""

    Config = Nothing
    ALL_PROCESSES = True

    def run(self, config: Any, work: Work) -> dict[str, Any]:
        rows = json.loads((work.inputs["rows"] / "rows.json").read_text())
        model = make_model(SHAPE, work.seed)

        def batches(chosen: Any) -> list[Any]:
            return [pack([strip(row, [1.0] * len(row))], 16) for row in chosen]

        loader = EpochLoader(rows, batches, items_a_step=4, epochs=2, seed=1)
        reports = train(
            model,
            objective=NextToken(),
            loader=loader,
            timeline=constant(total=loader.steps, lr=0.01),
            machine=work.machine,
            checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=1),
        )
        losses = []
        for report in reports:
            losses.append(report.loss)
            if report.step == 2 and os.environ.get("FAIL", "none") in ("all", os.environ.get("RANK")):
                raise UserError("this process does not like the second step")
        save(model, work.out / "model")
        return {"losses": losses, "world": parallel.world().size}

    def estimate(self, config: Any, inputs: Any) -> Estimate:
        return Estimate()


def recipe() -> Recipe:
    rows = Step("rows", Write(), {})
    return Recipe("several", Step("fit", Fit(), {}, {"rows": rows}))
