"""A recipe is checked when it is made, and its order and identities follow from its inputs alone."""

import math
from dataclasses import dataclass

import pytest
from jaxtyping import TypeCheckError
from small_stages import Count, Total

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError


def diamond(to: int = 3, seed: int = 0) -> Recipe:
    """numbers -> (left, right) -> top"""
    numbers = Step("numbers", Count, Count.Config(to=to))
    left = Step("left", Count, Count.Config(to=2), {"from": numbers})
    right = Step("right", Count, Count.Config(to=4), {"from": numbers})
    return Recipe("diamond", Step("top", Total, Total.Config(), {"left": left, "right": right}), seed=seed)


def test_each_step_follows_its_inputs_once() -> None:
    assert [step.name for step in diamond().steps()] == ["numbers", "left", "right", "top"]
    assert [step.name for step in diamond().until("left")] == ["numbers", "left"]
    assert [step.name for step in diamond().dependents("left")] == ["left", "top"]


def test_several_goals() -> None:
    first, second = Step("a", Count, Count.Config(1)), Step("b", Count, Count.Config(2))
    assert [step.name for step in Recipe("two", (first, second)).steps()] == ["a", "b"]


def test_a_change_reaches_every_step_below_and_no_other() -> None:
    before, after = diamond(to=3).identities(), diamond(to=5).identities()
    assert {name for name in before if before[name] != after[name]} == {"numbers", "left", "right", "top"}
    step = Step("alone", Count, Count.Config(1))
    assert Recipe("r", step).identities()["alone"] == Recipe("other", step).identities()["alone"]


def test_the_seed_counts_and_is_the_steps_own() -> None:
    assert diamond(seed=0).identities()["numbers"] != diamond(seed=1).identities()["numbers"]
    step = diamond().step("left")
    assert step.seed(0) != step.seed(1)
    assert step.seed(0) != diamond().step("right").seed(0)


def test_two_different_steps_of_one_name_are_refused() -> None:
    first, second = Step("a", Count, Count.Config(1)), Step("a", Count, Count.Config(2))
    with pytest.raises(UserError, match="two different steps are named 'a'"):
        Recipe("two", (first, second))
    assert len(Recipe("same", (first, Step("a", Count, Count.Config(1)))).steps()) == 1


def test_a_misspelt_field_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no field 'pause_second': did you mean pause_seconds\?"):
        Step("a", Count, {"to": 1, "pause_second": 2.0})
    with pytest.raises(UserError, match="needs to"):
        Step("a", Count, {"label": "x"})
    assert Step("a", Count, {"to": 1}).config == Count.Config(1)


def test_an_unknown_step_suggests_names() -> None:
    with pytest.raises(UserError, match="did you mean right"):
        diamond().step("rigth")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_names_are_directories(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        Step(name, Count, Count.Config(1))
    with pytest.raises(UserError, match="name"):
        Recipe(name, Step("a", Count, Count.Config(1)))


def test_what_is_no_stage_and_no_config_is_refused() -> None:
    with pytest.raises(UserError, match="has no Config, run, estimate"):
        Step("a", object(), {})
    with pytest.raises(UserError, match=r"takes Count\.Config"):
        Step("a", Count, Total.Config())


def test_inputs_and_goals_are_steps() -> None:
    numbers = Step("numbers", Count, Count.Config(1))
    # with the types of arguments checked, as here by default, most are refused for their type
    of_inputs, of_goal = (
        r"step 'total': its inputs are .* expected the steps that it reads|parameter 'inputs'",
        r"recipe 'r': its goal is .* expected a step, or a tuple of steps|parameter 'goal'",
    )
    for inputs in ([numbers], {"from": "numbers"}, (numbers,)):
        with pytest.raises((UserError, TypeCheckError), match=of_inputs):
            Step("total", Total, Total.Config(), inputs)
    for goal in ([numbers], (), ("numbers",), "numbers"):
        with pytest.raises((UserError, TypeCheckError), match=of_goal):
            Recipe("r", goal)


def test_a_configuration_without_a_canonical_form_is_refused() -> None:
    @dataclass(frozen=True)
    class Config:
        how: object = len

    class Odd:
        run = estimate = staticmethod(lambda *given: {})

    Odd.Config = Config
    for value in (len, math.inf, math.nan):
        with pytest.raises(UserError, match="step 'a': its configuration cannot be stored"):
            Recipe("r", Step("a", Odd, Config(value))).identities()
