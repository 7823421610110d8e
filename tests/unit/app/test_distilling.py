"""`upweight distill` as a recipe: who teaches, and what is refused before anything runs."""

import pytest

from upweight.app.distilling import Wanted, distilling
from upweight.core.errors import UserError
from upweight.stages import distill, teach
from upweight.synthesize.roles import Checkpoint, Endpoint

DPD = {"sequence": 1.0, "positive": 1.0, "negative": 1.0, "temperature": 1.0}
DPO = {**DPD, "positive": 0.0, "negative": 0.0}


def names(wanted: Wanted, settings: dict[str, float]) -> list[str]:
    return [step.name for step in distilling(wanted, settings, 0).steps()]


def test_the_teacher_is_live_stored_or_absent() -> None:
    assert names(Wanted("s", "p.jsonl"), DPO) == ["student", "pairs", "distilled"]
    assert names(Wanted("s", "p.jsonl", "t"), DPD) == ["student", "pairs", "teacher", "distilled"]
    assert names(Wanted("s", "p.jsonl", "t", cached=16), DPD) == ["student", "pairs", "teacher", "signal", "distilled"]
    assert names(Wanted("s", "p.jsonl", "t", endpoint="http://x/v1"), DPD) == [
        "student",
        "pairs",
        "signal",
        "distilled",
    ]


def test_settings_reach_their_steps() -> None:
    recipe = distilling(Wanted("s", "p.jsonl", "t", align=True), {**DPD, "beta": 0.3, "temperature": 2.0}, 5)
    assert isinstance(recipe.goal.config, distill.Config)
    assert (recipe.goal.config.beta, recipe.seed) == (0.3, 5)
    asked = recipe.step("signal").config
    assert isinstance(asked, teach.Config)
    assert (asked.teacher, asked.kept, asked.temperature, asked.alignment) == (Checkpoint("teacher"), 32, 2.0, "spans")
    far = distilling(Wanted("s", "p.jsonl", "t", endpoint="http://x/v1"), DPD, 0).step("signal").config
    assert isinstance(far, teach.Config)
    assert (far.teacher, far.kept) == (Endpoint("http://x/v1", "t"), 20)


def test_terms_that_nobody_can_teach_are_refused() -> None:
    with pytest.raises(UserError, match="need a teacher"):
        distilling(Wanted("s", "p.jsonl"), DPD, 0)
    with pytest.raises(UserError, match="of no teacher"):
        distilling(Wanted("s", "p.jsonl", cached=8), DPO, 0)
