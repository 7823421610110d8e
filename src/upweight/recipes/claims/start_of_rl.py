"""Reinforcement gains more from the distilled checkpoint than from SFT.

Report, section 4. The STEM stage from `sft` and from `dpd`, each behind a gate of its own, for as many steps.
The reference is the run from SFT; the two starts stand beside the ends, since it is the gain that is claimed.
"""

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, reinforced


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's `rl_stem` step from two checkpoints."""
    whole = quickstart.recipe(scale, seed)
    from_sft = reinforced(whole, "rl_from_sft", start=whole.step("sft"))
    arms = {
        "rl_from_sft": from_sft,
        "rl_from_dpd": whole.step("rl_stem"),
        "sft": whole.step("sft"),
        "dpd": whole.step("dpd"),
    }
    return compared(whole, "claim_start_of_rl", arms)
