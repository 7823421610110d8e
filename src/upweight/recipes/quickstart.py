"""quickstart: the whole recipe on a laptop CPU, on real input, in minutes.

Real text comes from the Python installation that runs this; problems are procedural and have exact answers. The student
gets few gold solutions; a teacher that was trained on many more, and refined solutions, bring it further.
"""

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.curate.readers import PythonInstallation
from upweight.curate.seeds import SeedRule
from upweight.curate.selection import WORKED_PROBLEM_WEIGHTS, Lift, Tier
from upweight.stages import (
    deduplicate,
    distill,
    evaluate,
    gate,
    ingest,
    mix,
    pair,
    pose,
    pretrain,
    reconstruct,
    refine,
    reinforce,
    report,
    retrieve,
    reward,
    sft,
    shard,
    tag,
)
from upweight.synthesize.difficulty import Gate
from upweight.synthesize.portions import Portions, Take
from upweight.synthesize.programs import ProgramDocuments
from upweight.synthesize.refine import Loop
from upweight.synthesize.stories import LARGEST_VALUE, SMALLEST_RANGE, StoryDocuments
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import fg_wsd
from upweight.verify.reward import RewardConfig

MEASURED_SCALE = 0.5
"""Below this scale the model learns next to nothing: the run shows that every stage works, on the easiest problems."""

TEXT = ("python-*", "c-code", "javascript", "documentation", "readme", "licence", "data")
STORIES, PROGRAMS = ("story-worked", "story-damaged"), ("code-worked", "code-damaged")

ANSWER_TOKENS = 96
"""The longest worked answer of the domain has about 85 tokens."""


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """The quickstart. `scale` below 1 shrinks data, tokens and steps for a quick look; the table is then no evidence.

    Below MEASURED_SCALE stories have one step and small numbers, so that even a poor model is right now and then,
    and the gates keep every problem, since few are of middle difficulty.
    """
    if scale <= 0:
        raise UserError(f"scale is {scale}: expected a number above 0; 1 is the quickstart as published")
    measured = scale >= MEASURED_SCALE
    fewest_steps, most_steps = (2, 6) if measured else (1, 1)
    largest_value = LARGEST_VALUE if measured else SMALLEST_RANGE
    bounds = Gate() if measured else Gate(low=-1.0, high=2.0)

    def of(count: float | int, least: int = 1) -> int:
        return max(least, round(count * scale))

    def optimizer(rest_scale: float) -> OptimizerConfig:
        return OptimizerConfig(kind="muon", rest_scale=rest_scale)

    # what is asked and what is held back; refinement, distillation and reinforcement each get stories of their own
    refined_stories, paired_stories = of(600, 60), of(1500, 100)
    reserved_steps = min(4, most_steps)
    problems = Step(
        "problems",
        pose,
        pose.Config(
            stem=refined_stories + paired_stories,
            code=of(400, 40),
            preference=of(800, 100),
            reserved_stem=of(240, 24),
            reserved_code=of(60, 12),
            gold_stem=of(2000, 160),
            gold_code=of(1000, 60),
            preference_pairs=of(1500, 200),
            fewest_steps=fewest_steps,
            most_steps=most_steps,
            fewest_reserved_steps=reserved_steps,
            most_reserved_steps=most_steps,
            largest_value=largest_value,
            most_operations=2,
            tests=5,
        ),
    )

    # reinforcement gets the harder ones: more of them pass the gate, and each is seen a few times only
    hard_problems = Step(
        "hard_problems",
        pose,
        pose.Config(
            stem=of(2600, 80),
            code=0,
            preference=0,
            reserved_stem=0,
            reserved_code=0,
            gold_stem=0,
            gold_code=0,
            preference_pairs=0,
            fewest_steps=reserved_steps,
            most_steps=most_steps,
            largest_value=largest_value,
        ),
    )

    # data: read, clean, tag, retrieve, mix
    documents = Step(
        "documents",
        ingest,
        ingest.Config(
            sources=(
                PythonInstallation(max_bytes=of(22e6, 1_000_000)),
                StoryDocuments(
                    of(24_000, 4000),
                    seed=seed + 1,
                    damaged_share=0.25,
                    dialogue_share=0.15,
                    fewest_steps=fewest_steps,
                    most_steps=most_steps,
                    largest_value=largest_value,
                ),
                ProgramDocuments(of(5_000, 800), seed=seed + 1, damaged_share=0.2, dialogue_share=0.45, most_steps=2),
            )
        ),
    )
    unique = Step("unique", deduplicate, deduplicate.Config(), {"documents": documents, "problems": problems})
    tags = Step("tags", tag, tag.Config(), {"documents": unique})
    similarity = Step(
        "similarity",
        retrieve,
        retrieve.Config(
            seeds=(
                SeedRule(("python-docstring", "readme"), {"educational_value": 4}, count=of(100, 10), source_share=1.0),
                SeedRule(("story-worked",), {"factual_reliability": 5}, WORKED_PROBLEM_WEIGHTS, of(40, 6), 1.0),
                SeedRule(("code-worked",), {"factual_reliability": 5}, count=of(40, 6), source_share=1.0),
            ),
            hits=50,
        ),
        {"documents": unique, "tags": tags},
    )
    mixture = Step(
        "mixture",
        mix,
        mix.Config(
            tiers=(
                Tier("dialogue", sources=("*-dialogue",)),
                Tier("math_high", sources=STORIES, share=0.62),
                Tier("math_medium", sources=STORIES, share=0.15),
                Tier("code_high", sources=PROGRAMS, share=0.75),
                Tier("text_high", sources=TEXT, share=0.6, min_utility=0.45),
                Tier("text_medium", sources=TEXT, min_utility=0.3),
            ),
            weights_by_source={"story-*": WORKED_PROBLEM_WEIGHTS},
            lift=Lift(similarity_weight=0.1),
        ),
        {"documents": unique, "tags": tags, "similarity": similarity},
    )
    shards = Step(
        "shards",
        shard,
        shard.Config(
            pools={
                "math_dialogue": shard.Pool(("dialogue",), ("story-*",)),
                "code_dialogue": shard.Pool(("dialogue",), ("code-*",)),
            }
            | {
                name: shard.Pool((name,))
                for name in ("math_high", "math_medium", "code_high", "text_high", "text_medium")
            },
            vocabulary=1024,
            control_sources=("*-dialogue",),
            tokenizer_bytes=of(3e6, 500_000),
        ),
        {"documents": mixture},
    )

    # FG-WSD: the rate stays while the mixture gets better; the decay doubles the context and raises the RoPE base
    timeline = fg_wsd(
        warmup=of(100_000, 10_000),
        diverse=of(900_000, 60_000),
        high_quality=of(700_000, 50_000),
        decay=of(1_100_000, 80_000),
        peak_lr=0.02,
        end_lr=0.0004,
        mixtures={
            "warmup": {
                "math_high": 0.45,
                "math_medium": 0.15,
                "code_high": 0.06,
                "text_high": 0.17,
                "text_medium": 0.17,
            },
            "diverse": {
                "math_high": 0.58,
                "math_medium": 0.12,
                "code_high": 0.06,
                "text_high": 0.12,
                "text_medium": 0.12,
            },
            "high_quality": {"math_high": 0.82, "code_high": 0.06, "text_high": 0.12},
            "decay": {
                "math_high": 0.36,
                "code_high": 0.04,
                "math_dialogue": 0.44,
                "code_dialogue": 0.12,
                "text_high": 0.04,
            },
        },
        context=192,
        rope_base=10_000.0,
        decay_context=384,
        decay_rope_base=40_000.0,
    )
    base = Step(
        "base",
        pretrain,
        pretrain.Config(phases=timeline.phases, optimizer=optimizer(0.15), batch_tokens=4096, microbatch_tokens=4096),
        {"shards": shards},
    )

    # supervision: few gold solutions, then refined solutions with reconstructed chains
    def tune(name: str, model: Step, data: tuple[sft.Part, ...], epochs: int, inputs: dict[str, Step]) -> Step:
        config = sft.Config(
            data=data,
            epochs=epochs,
            context=256,
            learning_rate=0.004,
            optimizer=optimizer(0.2),
        )
        return Step(name, sft, config, {"model": model, **inputs})

    gold = "problems/gold.jsonl"
    teacher = tune("teacher", base, (sft.Part(gold),), 2, {"problems": problems})
    cold_start = tune("cold_start", base, (sft.Part(gold, most=of(384, 64)),), 3, {"problems": problems})
    refined = Step(
        "refined",
        refine,
        refine.Config(
            problems={"stem.jsonl": refined_stories},
            loop=Loop(drafts=2, draft_limits=Limits(ANSWER_TOKENS)),
        ),
        {"problems": problems, "model": cold_start},
    )
    chains = Step("chains", reconstruct, reconstruct.Config(), {"refined": refined})
    tuned = tune(
        "sft",
        cold_start,
        (sft.Part("chains/conversations.jsonl"), sft.Part(gold, most=of(384, 64))),
        2,
        {"chains": chains, "problems": problems},
    )

    # preference distillation from the teacher
    pairs = Step(
        "pairs",
        pair,
        pair.Config(
            problems={"stem.jsonl": Take(paired_stories, after=refined_stories), "code.jsonl": of(300, 30)},
            teacher_samples=2,
            student_samples=2,
            teacher_limits=Limits(ANSWER_TOKENS, temperature=0.7),
            student_limits=Limits(ANSWER_TOKENS),
        ),
        {"problems": problems, "teacher": teacher, "student": tuned},
    )
    distilled = Step(
        "dpd",
        distill,
        distill.Config(normalise="sequence", epochs=2, learning_rate=0.002, optimizer=optimizer(0.2)),
        {"model": tuned, "teacher": teacher, "pairs": pairs},
    )

    # reinforcement, one domain at a time, each behind its gate
    judge = Step(
        "reward",
        reward,
        reward.Config(file="preference_pairs.jsonl", epochs=1, learning_rate=0.004, optimizer=optimizer(0.2)),
        {"model": tuned, "pairs": problems},
    )

    def staged(
        name: str, model: Step, posed: Step, files: Portions, kind: RewardConfig, steps: int, rate: float
    ) -> Step:
        kept = Step(
            f"gate_{name}",
            gate,
            gate.Config(
                problems=files,
                reward=RewardConfig("answer") if kind.kind == "preference" else kind,
                gate=bounds,
                limits=Limits(ANSWER_TOKENS),
                enough=of(1600),
            ),
            {"problems": posed, "model": model},
        )
        inputs = {"model": model, "problems": kept}
        if kind.kind == "preference":
            inputs["reward"] = judge
        config = reinforce.Config(
            reward=kind,
            steps=steps,
            problems_a_step=64,
            group=4,
            limits=Limits(ANSWER_TOKENS),
            learning_rate=rate,
            interpolation=0.7,
            optimizer=optimizer(0.3),
        )
        return Step(name, reinforce, config, inputs)

    answer, tests, preference = RewardConfig("answer"), RewardConfig("code"), RewardConfig("preference")
    stem = staged("rl_stem", distilled, hard_problems, {"stem.jsonl": 0}, answer, of(140, 3), 0.0015)
    code = staged("rl_code", stem, problems, {"code.jsonl": of(160, 40)}, tests, of(12, 2), 0.0005)
    final = staged("rl_preference", code, problems, {"preference.jsonl": of(128, 32)}, preference, of(8, 2), 0.0001)

    checkpoints = {
        "base": base,
        "cold_start": cold_start,
        "sft": tuned,
        "dpd": distilled,
        "rl_stem": stem,
        "rl_code": code,
        "rl_preference": final,
        "teacher": teacher,
    }
    table = Step(
        "evaluation",
        evaluate,
        evaluate.Config(samples=8, limits=Limits(ANSWER_TOKENS)),
        {"problems": problems, **checkpoints},
    )
    page = Step(
        "report",
        report,
        report.Config(title="upweight quickstart"),
        {
            step.name: step
            for step in (
                problems,
                hard_problems,
                documents,
                unique,
                tags,
                similarity,
                mixture,
                shards,
                refined,
                chains,
                pairs,
                judge,
            )
        }
        | checkpoints
        | {f"gate_{step.name}": step.inputs["problems"] for step in (stem, code, final)}
        | {"evaluation": table},
    )
    return Recipe("quickstart", page, seed=seed)
