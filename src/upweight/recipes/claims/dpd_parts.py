"""Distillation on both levels gains more than any of its parts.

Report, section 4. From one SFT checkpoint, on the same pairs, with the same number of steps: the sequence level alone
(DPO), the token level on the teacher's responses, the token level on both, all three terms. The reference is the SFT
checkpoint itself.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared

WEIGHTS = {
    "dpo": {"sequence": 1.0, "positive": 0.0, "negative": 0.0},
    "kd_positive": {"sequence": 0.0, "positive": 1.0, "negative": 0.0},
    "kd_both": {"sequence": 0.0, "positive": 1.0, "negative": 1.0},
}


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's `dpd` step with other weights of its three terms."""
    whole = quickstart.recipe(scale, seed)
    distilled = whole.step("dpd")
    parts = {
        name: Step(f"dpd_{name}", distilled.stage, replace(distilled.config, **weights), distilled.inputs)
        for name, weights in WEIGHTS.items()
    }
    return compared(whole, "claim_dpd_parts", {"sft": whole.step("sft"), **parts, "dpd": distilled})
