"""Checklists and critiques as models write them: JSON out, records in, and what is refused on the way."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from upweight.core.records import HIGHEST_SCORE
from upweight.synthesize.structured import FormError, json_object
from upweight.synthesize.trail import Aspect, Check, Criterion

MOST_CRITERIA = 12


def parse_checklist(text: str) -> tuple[Criterion, ...]:
    """The criteria that a checklist writer proposes. Raises FormError where they are not in form."""
    listed = json_object(text).get("criteria")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_CRITERIA:
        raise FormError(f'"criteria" has to be a list of 1 to {MOST_CRITERIA} objects')
    criteria = tuple(_criterion(item, place) for place, item in enumerate(listed, start=1))
    names = [criterion.name for criterion in criteria]
    if len(set(names)) < len(names):
        raise FormError(f"the names {names} are not all different")
    return criteria


def _criterion(item: Any, place: int) -> Criterion:
    if not isinstance(item, Mapping):
        raise FormError(f"criterion {place} is no object")
    name, requirement = item.get("name"), item.get("requirement")
    if not isinstance(name, str) or not name.strip() or not isinstance(requirement, str) or not requirement.strip():
        raise FormError(f'criterion {place} needs a "name" and a "requirement"')
    aspect = next((known for known in get_args(Aspect) if known == item.get("aspect")), None)
    check = next((known for known in get_args(Check) if known == item.get("check")), None)
    if aspect is None or check is None:
        raise FormError(
            f'criterion {place}: "aspect" is one of {", ".join(get_args(Aspect))}, "check" one of '
            f"{', '.join(get_args(Check))}"
        )
    weight = item.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1000:
        raise FormError(f'criterion {place}: "weight" has to be a number above 0')
    return Criterion(name.strip(), aspect, requirement.strip(), float(weight), check)


def checklist_text(criteria: Sequence[Criterion]) -> str:
    """A checklist as evaluators and revisers read it: one JSON object a line."""
    return "\n".join(
        json.dumps({"name": one.name, "aspect": one.aspect, "requirement": one.requirement, "weight": one.weight})
        for one in criteria
    )


class Judgement(NamedTuple):
    """What one evaluator gives one candidate: an integer 0-9 for each criterion, in their order, and a critique."""

    scores: tuple[int, ...]
    critique: str


def parse_judgement(text: str, criteria: Sequence[Criterion]) -> Judgement:
    """An evaluator's scores for exactly these criteria, and its critique. Raises FormError."""
    found = json_object(text)
    scores, critique = found.get("scores"), found.get("critique")
    if not isinstance(scores, Mapping) or not isinstance(critique, str):
        raise FormError('"scores" has to be an object and "critique" a string')
    names = [criterion.name for criterion in criteria]
    if sorted(scores) != sorted(names):
        raise FormError(f'"scores" has to name exactly {", ".join(names)}')
    for name, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int) or not 0 <= score <= HIGHEST_SCORE:
            raise FormError(f"the score of {name} has to be an integer from 0 to {HIGHEST_SCORE}")
    return Judgement(tuple(scores[name] for name in names), critique.strip())
