"""FG-WSD beats constant mixtures where the lower tier of mathematics is as sound as the higher.

Report, section 2, from scratch, half of the quickstart's tokens. Both tiers take sound stories only, so that they
differ by utility alone. Arms and reference are those of fg_wsd.
"""

from upweight.app.recipe import Recipe
from upweight.curate.selection import Tier
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, constant_mixtures, retiered


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's base on other tiers, with three mixtures."""
    whole = quickstart.recipe(scale, seed)
    sound = ("story-worked",)
    tiers = {
        "math_high": (Tier("math_high", sources=sound, share=0.7),),
        "math_medium": (Tier("math_medium", sources=sound),),
    }
    return compared(
        whole, "claim_fg_wsd_clean", constant_mixtures(retiered(whole, "clean", tiers), "base_clean", "fg_wsd")
    )
