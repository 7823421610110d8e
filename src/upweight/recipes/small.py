"""small: every stage of the recipe at 0.3B parameters, one day on one H100, on your own corpus and conversations.

Where the day goes. The model has 304M parameters (24 layers of width 1024, 32,768 tokens). A token costs 6 x 304M = 1.8
GFLOP of matrices, forwards and backwards, and 0.3 GFLOP of attention at 2,048 tokens of context: 2.1 GFLOP. At 35% of
the 989 TFLOP/s that an H100 is sold with that is 160,000 tokens a second. The 35% is an assumption: a 0.6B model had
36-42% on an H200 (docs/benchmarks.md), this one was not measured; `upweight plan small --device cuda` measures yours.

    pretraining                7.0G tokens / 160k = 12.2 h    23 tokens a parameter, in the report's proportions
    supervised fine-tuning     1.6G tokens / 160k =  2.8 h    two stages and the teacher, 2,700 tokens a conversation
    refinement, distillation, three stages of RL, evaluation: the rest, most of it decoding

Your data: JSON lines below `data/`, as CORPUS and CONVERSATIONS name them, or anything else in a file of your own:

    from upweight.recipes.small import recipe as small
    def recipe(scale=1.0, seed=0):
        return small(scale, seed, corpus=(Parquet("fineweb/*.parquet", source="web"),))

The timeline reads 1.9G tokens of the medium tier and 5.1G better ones, each at most four times over; about 4G tokens
(16 GB of text) should come in. Curation runs on CPUs: `--until shards` needs no GPU. Which learning rates are best at
this size has not been measured here.
"""

from collections.abc import Mapping, Sequence

from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.curate.readers import JsonLines
from upweight.curate.seeds import SeedRule
from upweight.curate.selection import Tier
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
from upweight.synthesize.portions import Portions, Take
from upweight.synthesize.programs import ProgramDocuments
from upweight.synthesize.refine import Loop
from upweight.synthesize.roles import Checkpoint
from upweight.synthesize.stories import StoryDocuments
from upweight.text.conversations import ConversationDataset, ConversationFiles
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import fg_wsd
from upweight.verify.reward import RewardConfig

# ---- your data -------------------------------------------------------------------------------------------------------

CORPUS = (
    JsonLines("data/web/*.jsonl*", source="web"),
    JsonLines("data/papers/*.jsonl*", source="papers"),
    JsonLines("data/books/*.jsonl*", source="books"),
    JsonLines("data/code/*.jsonl*", source="code"),
    JsonLines("data/reasoning/*.jsonl*", source="reasoning"),
)
"""Documents, one JSON object with `text` a line. "reasoning" and "code" are what the decay phase has more of."""

CONVERSATIONS = (
    ConversationFiles("data/chats/reasoning/*.jsonl*", source="reasoning", most=150_000),
    ConversationFiles("data/chats/general/*.jsonl*", source="general", most=60_000),
)
"""Conversations with `messages`; a data set of the hub is ConversationDataset("owner/name", most=100_000)."""

# ----------------------------------------------------------------------------------------------------------------------

ANSWER = Limits(max_new_tokens=384)
CONTEXT, LONG_CONTEXT = 2048, 8192


def recipe(
    scale: float = 1.0,
    seed: int = 0,
    *,
    corpus: Sequence[object] = CORPUS,
    conversations: Sequence[ConversationFiles | ConversationDataset] = CONVERSATIONS,
) -> Recipe:
    """The whole recipe; `scale` shrinks or grows tokens, problems and steps, not the model."""
    if scale <= 0:
        raise UserError(f"scale is {scale}: expected a number above 0; 1 is a day of an H100")

    def of(count: float | int) -> int:
        return max(1, round(count * scale))

    # what is asked and what is held back
    problems = Step(
        "problems",
        pose,
        pose.Config(
            stem=of(24_000),
            code=of(4_000),
            preference=of(4_000),
            reserved_stem=of(400),
            reserved_code=of(100),
            gold_stem=of(8_000),
            gold_code=of(2_000),
            preference_pairs=of(8_000),
        ),
    )

    # data: read, clean, tag, retrieve, mix
    exercises = (
        StoryDocuments(of(400_000), seed=seed + 1, damaged_share=0.0, dialogue_share=0.3),
        ProgramDocuments(of(100_000), seed=seed + 1, damaged_share=0.0, dialogue_share=0.3),
    )
    documents = Step("documents", ingest, ingest.Config(sources=(*corpus, *exercises)))  # type: ignore[arg-type]
    unique = Step("unique", deduplicate, deduplicate.Config(), {"documents": documents, "problems": problems})
    tags = Step("tags", tag, tag.Config(), {"documents": unique})
    similarity = Step(
        "similarity",
        retrieve,
        retrieve.Config(seeds=(SeedRule(("*",), {"educational_value": 6, "factual_reliability": 6}, count=2_000),)),
        {"documents": unique, "tags": tags},
    )
    mixture = Step(
        "mixture",
        mix,
        mix.Config(tiers=(Tier("high", share=0.35, min_utility=0.5), Tier("medium", share=0.45, min_utility=0.35))),
        {"documents": unique, "tags": tags, "similarity": similarity},
    )
    shards = Step(
        "shards",
        shard,
        shard.Config(
            pools={
                "dialogue": shard.Pool(("high", "medium"), ("*-dialogue",)),
                "reasoning": shard.Pool(("high", "medium"), ("reasoning", "story-*", "code-*")),
                "code": shard.Pool(("high",), ("code",)),
                "high": shard.Pool(("high",)),
                "medium": shard.Pool(("medium",)),
            },
            vocabulary=32_768,
            control_sources=("*-dialogue",),
            tokenizer_bytes=2_000_000_000,
        ),
        {"documents": mixture},
    )

    # FG-WSD in the report's proportions (0.1 : 12.4 : 6.5 : 4 of 23), the decay at four times the context
    timeline = fg_wsd(
        warmup=of(100_000_000),
        diverse=of(3_700_000_000),
        high_quality=of(2_000_000_000),
        decay=of(1_200_000_000),
        peak_lr=0.02,
        end_lr=0.0004,
        mixtures={
            "warmup": {"high": 0.4, "code": 0.1, "medium": 0.5},
            "diverse": {"high": 0.4, "code": 0.1, "medium": 0.5},
            "high_quality": {"high": 0.75, "code": 0.15, "reasoning": 0.1},
            "decay": {"high": 0.4, "code": 0.2, "reasoning": 0.35, "dialogue": 0.05},
        },
        context=CONTEXT,
        rope_base=10_000.0,
        decay_context=LONG_CONTEXT,
        decay_rope_base=500_000.0,
    )
    base = Step(
        "base",
        pretrain,
        pretrain.Config(
            phases=timeline.phases,
            shape=pretrain.Shape(width=1024, layers=24, heads=16, kv_heads=4, ffn=2816),
            optimizer=OptimizerConfig(kind="muon", rest_scale=0.1, weight_decay=0.1),
            z_loss=1e-4,
            batch_tokens=524_288,
            microbatch_tokens=16_384,
            save_every_steps=250,
            dtype="bfloat16",
        ),
        {"shards": shards},
    )

    # supervision: your conversations and gold solutions, then refined solutions with reconstructed chains
    def tune(name: str, model: Step, data: Sequence[sft.Source], epochs: int, inputs: Mapping[str, Step]) -> Step:
        config = sft.Config(
            data=tuple(data),
            epochs=epochs,
            context=LONG_CONTEXT,
            batch_tokens=262_144,
            microbatch_tokens=16_384,
            learning_rate=0.002,
            optimizer=OptimizerConfig(kind="muon", rest_scale=0.1),
            dtype="bfloat16",
        )
        return Step(name, sft, config, {"model": model, **inputs})

    gold = "problems/gold.jsonl"
    some = sft.Part(gold, most=of(1_000))
    teacher = tune("teacher", base, (*conversations, sft.Part(gold)), 1, {"problems": problems})
    cold_start = tune("cold_start", base, (conversations[0], some), 1, {"problems": problems})
    refined = Step(
        "refined",
        refine,
        refine.Config(
            problems={"stem.jsonl": of(6_000)},
            loop=Loop(drafts=4, draft_limits=ANSWER),
            drafters=(Checkpoint("model", dtype="bfloat16"),),
        ),
        {"problems": problems, "model": cold_start},
    )
    chains = Step("chains", reconstruct, reconstruct.Config(), {"refined": refined})
    tuned = tune(
        "sft",
        cold_start,
        (sft.Part("chains/conversations.jsonl"), some, *conversations),
        1,
        {"chains": chains, "problems": problems},
    )

    # preference distillation from the teacher
    pairs = Step(
        "pairs",
        pair,
        pair.Config(
            problems={"stem.jsonl": Take(of(8_000), after=of(6_000)), "code.jsonl": of(1_000)},
            teacher=Checkpoint("teacher", dtype="bfloat16"),
            student=Checkpoint("student", dtype="bfloat16"),
            teacher_limits=ANSWER,
            student_limits=ANSWER,
        ),
        {"problems": problems, "teacher": teacher, "student": tuned},
    )
    distilled = Step(
        "dpd",
        distill,
        distill.Config(
            pairs_a_step=64,
            pairs_a_batch=32,
            row_tokens=1024,
            learning_rate=0.0005,
            optimizer=OptimizerConfig(kind="muon", rest_scale=0.1),
            dtype="bfloat16",
        ),
        {"model": tuned, "teacher": teacher, "pairs": pairs},
    )

    # reinforcement, one domain at a time, each behind its gate; in fp32, so that sampler and trainer agree
    judge = Step(
        "reward",
        reward,
        reward.Config(file="preference_pairs.jsonl", row_tokens=1024, learning_rate=0.001, dtype="bfloat16"),
        {"model": tuned, "pairs": problems},
    )

    def staged(name: str, model: Step, files: Portions, kind: RewardConfig, steps: int) -> Step:
        is_preference = kind.kind == "preference"
        measured = RewardConfig("answer") if is_preference else kind
        kept = Step(
            f"gate_{name}",
            gate,
            gate.Config(problems=files, reward=measured, limits=ANSWER, dtype="bfloat16"),
            {"problems": problems, "model": model},
        )
        config = reinforce.Config(
            reward=kind,
            steps=steps,
            problems_a_step=32,
            group=16,
            limits=ANSWER,
            learning_rate=0.0005,
            optimizer=OptimizerConfig(kind="muon", rest_scale=0.1),
            batch_tokens=32_768,
        )
        inputs = {"model": model, "problems": kept, **({"reward": judge} if is_preference else {})}
        return Step(name, reinforce, config, inputs)

    # each step has problems of its own
    unseen_stem, unseen_code = Take(of(10_000), after=of(14_000)), Take(of(3_000), after=of(1_000))
    stem = staged("rl_stem", distilled, {"stem.jsonl": unseen_stem}, RewardConfig("answer"), of(200))
    code = staged("rl_code", stem, {"code.jsonl": unseen_code}, RewardConfig("code"), of(60))
    final = staged("rl_preference", code, {"preference.jsonl": of(1_500)}, RewardConfig("preference"), of(40))

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
        evaluate.Config(samples=8, limits=Limits(max_new_tokens=384, temperature=0.6, top_p=0.95), dtype="bfloat16"),
        {"problems": problems, **checkpoints},
    )
    page = Step(
        "report",
        report,
        report.Config(title="upweight small"),
        {
            step.name: step
            for step in (problems, documents, unique, tags, similarity, mixture, shards, refined, chains, pairs, judge)
        }
        | checkpoints
        | {f"gate_{step.name}": step.inputs["problems"] for step in (stem, code, final)}
        | {"evaluation": table},
    )
    return Recipe("small", page, seed=seed)
