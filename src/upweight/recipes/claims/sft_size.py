"""More samples of supervised fine-tuning keep helping.

Report, section 3: growing the cold start from 0.5M to 35M samples kept improving. Here a quarter, the whole and four
times the quickstart's cold start, each for the same number of epochs; the reference is the smallest.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared

SIZES = (0.25, 1.0, 4.0)


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's `cold_start` step with fewer and more gold solutions."""
    whole = quickstart.recipe(scale, seed)
    step = whole.step("cold_start")
    (gold,) = step.config.data
    arms = {}
    for size in SIZES:
        most = max(1, round(gold.most * size))
        config = replace(step.config, data=(replace(gold, most=most),))
        arms[f"gold_{most}"] = step if size == 1.0 else Step(f"cold_start_{most}", step.stage, config, step.inputs)
    return compared(whole, "claim_sft_size", arms)
