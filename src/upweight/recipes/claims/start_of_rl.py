"""Reinforcement gains more from the distilled checkpoint than from SFT.

Report, section 4. The STEM stage from `sft` and from `dpd`, each behind a gate of its own, for as many steps.
The reference is the run from SFT; the two starts stand beside the ends, since it is the gain that is claimed.
"""

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, gated, reinforced, short


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's STEM stage from two checkpoints."""
    whole = quickstart.recipe(scale, seed)
    tuned, distilled = whole.step("sft"), whole.step("dpd")
    from_sft = reinforced(whole, "rl_from_sft", model=tuned, kept=gated(whole, "gate_rl_from_sft", tuned))
    arms = {"rl_from_sft": from_sft, "rl_from_dpd": short(whole), "sft": tuned, "dpd": distilled}
    return compared(whole, "claim_start_of_rl", arms)
