"""Reinforcement learns more from problems that the checkpoint solves sometimes.

Report, section 5: only problems with 0.1 < avg@16 < 0.9 stay. As many problems without the gate, drawn from the same
stream, and as many steps; the reference is the run without it, and the start of both stands beside them.
"""

from upweight.app.recipe import Recipe
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, gated, reinforced, short
from upweight.synthesize.difficulty import Gate


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's STEM stage behind its gate and behind one that keeps everything."""
    whole = quickstart.recipe(scale, seed)
    start = whole.step("dpd")
    every = gated(whole, "gate_open", start, gate=Gate(count=1, low=-1.0, high=2.0))
    ungated = reinforced(whole, "rl_ungated", kept=every)
    return compared(whole, "claim_difficulty_gate", {"ungated": ungated, "gated": short(whole), "dpd": start})
