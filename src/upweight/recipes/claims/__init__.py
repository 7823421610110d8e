"""Claims of the recipe as experiments: each file a recipe whose goal compares checkpoints. `upweight ablate` runs them.

They vary single steps of the quickstart and keep its name, so that claims share what they have in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.curate.selection import Tier
from upweight.curate.usefulness import Labels
from upweight.stages import predict
from upweight.train.timeline import Phase, Timeline

SHARE = 9 / 28
"""Of the steps of the quickstart's STEM stage, what claims about reinforcement take for each arm: 45 at scale 1. Over
three seeds reward has then risen by half to two thirds of all that it gains."""

EPOCHS_OF_SMALL_POOLS = 24.0
"""What equal shares of all pools ask of the smallest, of programs, at most."""


def compared(whole: Recipe, name: str, arms: Mapping[str, Step]) -> Recipe:
    """The quickstart, cut down to an evaluation `name` of these checkpoints, the reference first."""
    table = whole.step("evaluation")
    inputs = {"problems": whole.step("problems"), **arms}
    return Recipe(whole.name, Step(name, table.stage, table.config, inputs), seed=whole.seed)


def gated(
    whole: Recipe, name: str, model: Step, posed: Step | None = None, measured: Step | None = None, **changes: Any
) -> Step:
    """The quickstart's gate before STEM as the step `name`, by another checkpoint, over other problems, spared what
    `measured` has measured, or set otherwise."""
    original = whole.step("gate_rl_stem")
    inputs = {"problems": posed or original.inputs["problems"], "model": model}
    known = {} if measured is None else {"measured": measured}
    return Step(name, original.stage, replace(original.config, **changes), inputs | known)


def short_steps(whole: Recipe) -> int:
    """How many steps of reinforcement an arm has."""
    steps: int = whole.step("rl_stem").config.steps
    return max(2, round(steps * SHARE))


def reinforced(
    whole: Recipe, name: str, *, kept: Step | None = None, model: Step | None = None, **changes: Any
) -> Step:
    """The quickstart's STEM stage with fewer steps as the step `name`, from another checkpoint, behind another gate, or
    set otherwise."""
    original = whole.step("rl_stem")
    inputs = {"model": model or original.inputs["model"], "problems": kept or original.inputs["problems"]}
    return Step(name, original.stage, replace(original.config, **({"steps": short_steps(whole)} | changes)), inputs)


def short(whole: Recipe) -> Step:
    """The quickstart's STEM stage with fewer steps, as several claims have it."""
    return reinforced(whole, "rl_short")


def shortened(phases: Sequence[Phase], parts: int) -> tuple[Phase, ...]:
    """The same phases, each one part in `parts` as long."""
    return tuple(replace(phase, tokens=max(1, phase.tokens // parts)) for phase in phases)


def constant_mixtures(base: Step, name: str, called: str) -> dict[str, Step]:
    """A step of pretraining, here `called` so, beside two whose phases all have one mixture: "wsd", that of all its
    tokens together, and "uniform", equal shares of all its pools, of which small ones are repeated more often."""
    timeline = Timeline(base.config.phases)
    average = {pool: tokens / timeline.tokens for pool, tokens in timeline.needed().items()}
    equal = dict.fromkeys(average, 1 / len(average))

    def constant(arm: str, mixture: Mapping[str, float], epochs: float) -> Step:
        phases = tuple(replace(phase, mixture=mixture) for phase in timeline.phases)
        return Step(f"{name}_{arm}", base.stage, replace(base.config, phases=phases, epochs=epochs), base.inputs)

    return {
        "wsd": constant("wsd", average, base.config.epochs),
        called: base,
        "uniform": constant("uniform", equal, EPOCHS_OF_SMALL_POOLS),
    }


def retiered(whole: Recipe, name: str, tiers: Mapping[str, tuple[Tier, ...]]) -> Step:
    """The quickstart's base at half of its tokens on a mixture of which some tiers are others, by the name of those
    that they replace."""
    base, shards = whole.step("base"), whole.step("shards")
    mixture = shards.inputs["documents"]
    kept = tuple(other for tier in mixture.config.tiers for other in tiers.get(tier.name, (tier,)))
    mixed = Step(f"mixture_{name}", mixture.stage, replace(mixture.config, tiers=kept), mixture.inputs)
    sharded = Step(f"shards_{name}", shards.stage, shards.config, {"documents": mixed})
    config = replace(base.config, phases=shortened(base.config.phases, 2))
    return Step(f"base_{name}", base.stage, config, {"shards": sharded})


def of_labels(name: str, annotated: str, arms: Mapping[str, Labels], seed: int) -> Recipe:
    """A comparison of labels on annotated documents. Raises UserError where none are given."""
    if not annotated:
        raise UserError(
            f"{name} compares the labels that a strong model gave to documents: say where they are, --annotated FILE, "
            "one JSON object a line with id, source and scores. `upweight annotate CORPUS DIRECTORY` writes such a file"
        )
    return Recipe(name, Step(f"claim_{name}", predict, predict.Config(annotated, arms, share=0.5)), seed=seed)
