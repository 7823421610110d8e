"""Reinforcement in stages, one domain each, beats one run on all domains.

Report, section 5: in a mixed run mathematics keeps improving while code stalls. Stories and then programs, each behind
its gate by the checkpoint before; or both together, behind one gate by the checkpoint before both. The same problems
are measured and the same number of steps is taken at the same learning rate, a quarter of each on programs, as one in
four of the problems is. The reference is the mixed run.
"""

from dataclasses import replace

from upweight.app.recipe import Recipe, Step
from upweight.recipes import quickstart
from upweight.recipes.claims import compared, gated, reinforced, short_steps
from upweight.verify.reward import RewardConfig

STORIES, PROGRAMS = 600, 200


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart's stages of STEM and code, one after the other and together."""
    whole = quickstart.recipe(scale, seed)
    start = whole.step("dpd")
    stories, programs = max(60, round(STORIES * scale)), max(20, round(PROGRAMS * scale))
    hard = whole.step("hard_problems")
    posed = Step(
        "problems_of_two_domains",
        hard.stage,
        replace(hard.config, stem=stories, code=programs, most_operations=2, tests=5),
    )
    steps = short_steps(whole)
    last = max(1, round(steps * PROGRAMS / (STORIES + PROGRAMS)))
    of_stories, of_programs = {"stem.jsonl": stories}, {"code.jsonl": programs}
    check = RewardConfig("check")

    both = gated(whole, "gate_mixed", start, posed, problems=of_stories | of_programs, reward=check, enough=0)
    mixed = reinforced(whole, "rl_mixed", kept=both, reward=check, steps=steps)

    first = gated(whole, "gate_staged_stem", start, posed, both, problems=of_stories, reward=check, enough=0)
    stem = reinforced(whole, "rl_staged_stem", kept=first, reward=check, steps=steps - last)
    second = gated(whole, "gate_staged_code", stem, posed, problems=of_programs, reward=check, enough=0)
    staged = reinforced(whole, "rl_staged_code", model=stem, kept=second, reward=check, steps=last)
    arms = {"mixed": mixed, "staged": staged, "staged_stem": stem, "dpd": start}
    return compared(whole, "claim_staging", arms)
