"""FG-WSD beats constant mixtures where the model can do the task already.

Report, section 2, the other regime: the quickstart's base goes on for a quarter of its tokens. Arms and reference are
those of fg_wsd; the start stands beside them.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, constant_mixtures, shortened


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's base, trained further with three mixtures."""
    whole = quickstart.recipe(scale, seed)
    base = whole.step("base")
    config = replace(base.config, phases=shortened(base.config.phases, 4))
    further = Step("base_further", base.stage, config, {**base.inputs, "init": base})
    arms = constant_mixtures(further, "base_further", "fg_wsd")
    return compared(whole, "claim_fg_wsd_formed", {**arms, "start": base})
