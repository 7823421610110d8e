"""Claims of the recipe as experiments: each file a recipe whose goal compares checkpoints. `upweight ablate` runs them.

They vary single steps of the quickstart and keep its name, so that claims share what they have in common.
"""

from collections.abc import Mapping

from upweight.app.recipe import Recipe, Step
from upweight.stages import gate, reinforce


def compared(whole: Recipe, name: str, arms: Mapping[str, Step]) -> Recipe:
    """The quickstart, cut down to an evaluation `name` of these checkpoints, the reference first."""
    table = whole.step("evaluation")
    inputs = {"problems": whole.step("problems"), **arms}
    return Recipe(whole.name, Step(name, table.stage, table.config, inputs), seed=whole.seed)


def reinforced(
    whole: Recipe,
    name: str,
    *,
    start: Step | None = None,
    behind: gate.Config | None = None,
    config: reinforce.Config | None = None,
) -> Step:
    """The quickstart's `rl_stem` as the step `name`, from another checkpoint, behind another gate, or set otherwise."""
    original = whole.step("rl_stem")
    kept = original.inputs["problems"]
    model = start or original.inputs["model"]
    passed = Step(f"gate_{name}", gate, behind or kept.config, {**kept.inputs, "model": model})
    return Step(name, reinforce, config or original.config, {**original.inputs, "model": model, "problems": passed})
