"""Refined solutions with reconstructed chains teach more than raw samples, or than refined answers on broken chains.

Report, section 3. From one cold start, on the same problems with the same gold solutions beside them, for the same
number of epochs: the first draft as it was sampled, the refined solution behind the thought of its draft, the refined
solution behind a reconstructed chain. The reference are the raw samples; the start stands beside them.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's `sft` step on other chains."""
    whole = quickstart.recipe(scale, seed)
    tuned, chains = whole.step("sft"), whole.step("chains")

    def on(name: str, target: str) -> Step:
        other = Step(f"chains_{name}", chains.stage, replace(chains.config, target=target), chains.inputs)
        return Step(f"sft_{name}", tuned.stage, tuned.config, {**tuned.inputs, "chains": other})

    arms = {
        "raw": on("raw", "draft"),
        "broken": on("broken", "kept"),
        "refined": tuned,
        "cold_start": whole.step("cold_start"),
    }
    return compared(whole, "claim_refinement", arms)
