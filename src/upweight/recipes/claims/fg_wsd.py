"""A mixture that gets better while the learning rate stays constant beats the same tokens in a constant mixture.

Report, section 2, from scratch: FG-WSD against plain WSD, which sees the same number of tokens of every pool in another
order, and against equal shares of all pools throughout. Learning rates, contexts and RoPE bases are the same. The
reference is plain WSD.
"""

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, constant_mixtures


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's base beside ones whose phases all have one mixture."""
    whole = quickstart.recipe(scale, seed)
    base = whole.step("base")
    return compared(whole, "claim_fg_wsd", constant_mixtures(base, "base", "fg_wsd"))
