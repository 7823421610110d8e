"""FG-WSD beats constant mixtures where the lower tier of mathematics is noisy.

Report, section 2, from scratch, half of the quickstart's tokens. The lower tier is what the quickstart drops: three in
four of its stories are damaged. Arms and reference are those of fg_wsd.
"""

from upweight.app.recipe import Recipe
from upweight.curate.selection import Tier
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, constant_mixtures, retiered


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's base on other tiers, with three mixtures."""
    whole = quickstart.recipe(scale, seed)
    sources = quickstart.STORIES
    tiers = {"math_medium": (Tier("math_left_out", sources=sources, share=0.15), Tier("math_medium", sources=sources))}
    return compared(
        whole, "claim_fg_wsd_noisy", constant_mixtures(retiered(whole, "noisy", tiers), "base_noisy", "fg_wsd")
    )
