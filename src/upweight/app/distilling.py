"""`upweight distill`: the recipe of a distillation on pairs of one's own, without the rest of the line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.stages import adopt, collect, distill, teach
from upweight.synthesize.roles import Checkpoint, Endpoint
from upweight.train.optimizer import OptimizerConfig

NAME = "dpd"
KEPT, KEPT_BY_ENDPOINT = 32, 20
"""Tokens of a stored distribution; vLLM gives 20 unless it is started with another bound."""


@dataclass(frozen=True)
class Wanted:
    """Who learns from whom, on what.

    Attributes:
        student, teacher: checkpoint directories or hub names; no teacher is DPO alone.
        pairs: a JSONL file.
        cached: tokens of each distribution of the teacher that are stored; 0 runs the teacher beside the student.
        endpoint: where the teacher is served, "" or None where it is a checkpoint.
        align: whether a teacher of another tokenizer is aligned by spans.
    """

    student: str
    pairs: str
    teacher: str | None = None
    cached: int = 0
    endpoint: str | None = None
    align: bool = False


def distilling(wanted: Wanted, settings: Mapping[str, Any], seed: int) -> Recipe:
    """The steps from a student and a file of pairs to a checkpoint.

    Args:
        settings: fields of stages/distill.Config.

    Raises UserError where a term is asked for that nobody can teach.
    """
    if wanted.teacher is None:
        if wanted.endpoint or wanted.align or wanted.cached:
            raise UserError("an endpoint, a cache or an alignment of no teacher: name one with --teacher")
        if settings["positive"] or settings["negative"]:
            raise UserError("the KL terms need a teacher: name one with --teacher, or set their weights to 0")
    student = Step("student", adopt, adopt.Config(wanted.student))
    pairs = Step("pairs", collect, collect.Config(pairs=wanted.pairs))
    inputs = {"model": student, "pairs": pairs}
    if wanted.teacher is not None:
        inputs = inputs | _taught(wanted, inputs, float(settings["temperature"]))
    config = distill.Config(**settings, row_tokens=2048, optimizer=OptimizerConfig(kind="adamw"))
    return Recipe(NAME, Step("distilled", distill, config, inputs), seed=seed)


def _taught(wanted: Wanted, inputs: Mapping[str, Step], temperature: float) -> dict[str, Step]:
    """The teacher as an input of the last step: live, or stored before."""
    assert wanted.teacher is not None
    if wanted.endpoint:
        endpoint = Endpoint(wanted.endpoint, wanted.teacher)
        config = teach.Config(endpoint, kept=wanted.cached or KEPT_BY_ENDPOINT, temperature=temperature)
        return {"signal": Step("signal", teach, config, inputs)}
    teacher = Step("teacher", adopt, adopt.Config(wanted.teacher))
    if not wanted.cached and not wanted.align:
        return {"teacher": teacher}
    config = teach.Config(
        Checkpoint("teacher"),
        kept=wanted.cached or KEPT,
        temperature=temperature,
        alignment="spans" if wanted.align else "none",
    )
    return {"signal": Step("signal", teach, config, {**inputs, "teacher": teacher})}
