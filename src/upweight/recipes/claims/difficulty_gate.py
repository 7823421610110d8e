"""Reinforcement learns more from problems that the checkpoint solves sometimes.

Report, section 5: only problems with 0.1 < avg@16 < 0.9 stay. As many problems without the gate, drawn from the same
stream, and as many steps; the reference is the run without it.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, reinforced
from upweight.synthesize.difficulty import Gate


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's `rl_stem` step behind its gate and behind one that keeps everything."""
    whole = quickstart.recipe(scale, seed)
    gated = whole.step("rl_stem")
    config = replace(gated.inputs["problems"].config, gate=Gate(count=1, low=-1.0, high=2.0))
    open_gate = reinforced(whole, "rl_ungated", behind=config)
    return compared(whole, "claim_difficulty_gate", {"ungated": open_gate, "gated": gated, "dpd": whole.step("dpd")})
