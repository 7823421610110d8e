"""A mixture that gets better while the learning rate stays constant beats the same tokens in a constant mixture.

Report, section 2, from scratch: FG-WSD against plain WSD. Both see the same number of tokens of every pool, at the same
learning rates, contexts and RoPE bases; only the order differs. The reference is plain WSD.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared
from upweight.train.timeline import Timeline


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's base beside one whose phases all have the average mixture."""
    whole = quickstart.recipe(scale, seed)
    base = whole.step("base")
    timeline = Timeline(base.config.phases)
    average = {pool: tokens / timeline.tokens for pool, tokens in timeline.needed().items()}
    config = replace(base.config, phases=tuple(replace(phase, mixture=average) for phase in timeline.phases))
    constant = Step("base_wsd", base.stage, config, base.inputs)
    return compared(whole, "claim_fg_wsd", {"wsd": constant, "fg_wsd": base})
