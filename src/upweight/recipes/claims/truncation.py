"""Completions that the length limit cuts off are better masked than counted as failures.

Report, section 5: the loss of truncated sequences is masked. The STEM stage with a limit that cuts about a quarter of
the first completions off, with and without the mask, and without such a limit. Evaluated with the quickstart's limit,
which nothing exceeds; the reference counts what was cut off as a failure.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, reinforced, short

CUT_TOKENS = 60
"""Of 256 completions at the start of the STEM stage, half have 54 tokens or fewer, a quarter 60 or more, none 67."""


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's STEM stage with short completions, once with what is cut off masked and once without."""
    whole = quickstart.recipe(scale, seed)
    config = whole.step("rl_stem").config
    limits = replace(config.limits, max_new_tokens=CUT_TOKENS)
    unmasked = replace(config.objective, mask_truncated=False)
    arms = {
        "unmasked": reinforced(whole, "rl_cut_unmasked", limits=limits, objective=unmasked),
        "masked": reinforced(whole, "rl_cut_masked", limits=limits),
        "uncut": short(whole),
        "dpd": whole.step("dpd"),
    }
    return compared(whole, "claim_truncation", arms)
