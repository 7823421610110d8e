"""nanbeige4_3b: the report's numbers (arXiv 2512.06266), each with its section, for a cluster and one's own corpus.

The corpus is not public: put JSONL files below `data/` as named here, or copy this file and change the sources. What
the report leaves open is marked "open"; docs/equations.md lists the reasons.
"""

from upweight.app.recipe import Recipe, Step
from upweight.core.protocols import Limits
from upweight.curate.readers import JsonLines
from upweight.curate.selection import Tier
from upweight.stages import deduplicate, ingest, mix, pose, pretrain, retrieve, sft, shard, tag
from upweight.text.conversations import ConversationFiles
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Timeline, fg_wsd

TRILLION = 10**12

WARMUP, DIVERSE, HIGH_QUALITY, DECAY = 100_000_000_000, 12_400_000_000_000, 6_500_000_000_000, 4_000_000_000_000
"""Tokens of the four phases, section 2.2: 0.1T + 12.4T + 6.5T + 4T = 23T."""


def timeline(scale: float = 1.0) -> Timeline:
    """Section 2.2: constant rate while the mixture gets better, then decay with ABF to 64K. Context, base: open."""

    def of(tokens: int) -> int:
        return max(1, round(tokens * scale))

    return fg_wsd(
        warmup=of(WARMUP),
        diverse=of(DIVERSE),
        high_quality=of(HIGH_QUALITY),
        decay=of(DECAY),
        peak_lr=4.5e-4,
        end_lr=1.5e-6,
        mixtures={
            "warmup": {"high": 0.5, "medium": 0.5},
            "diverse": {"high": 0.5, "medium": 0.5},
            "high_quality": {"high": 1.0},
            "decay": {"high": 0.4, "reasoning": 0.6},
        },
        context=4096,
        rope_base=10_000.0,
        decay_context=65_536,
        decay_rope_base=70_000_000.0,
    )


def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    """Data, FG-WSD pretraining and the two supervised stages at the report's sizes; `upweight plan` prices it."""
    problems = Step("problems", pose, pose.Config(), {})
    documents = Step(
        "documents",
        ingest,
        ingest.Config(
            sources=(
                JsonLines("data/web/*.jsonl", source="web"),
                JsonLines("data/papers/*.jsonl", source="papers"),
                JsonLines("data/books/*.jsonl", source="books"),
                JsonLines("data/code/*.jsonl", source="code"),
                JsonLines("data/reasoning/*.jsonl", source="reasoning"),
            )
        ),
    )
    unique = Step("unique", deduplicate, deduplicate.Config(), {"documents": documents, "problems": problems})
    tags = Step("tags", tag, tag.Config(), {"documents": unique})
    similarity = Step("similarity", retrieve, retrieve.Config(), {"documents": unique, "tags": tags})
    mixture = Step(
        "mixture",
        mix,
        # section 2.1: 12.5T tokens of high quality, of which 6.5T of higher quality
        mix.Config(tiers=(Tier("high", share=0.28, min_utility=0.5), Tier("medium", share=0.27, min_utility=0.35))),
        {"documents": unique, "tags": tags, "similarity": similarity},
    )
    shards = Step(
        "shards",
        shard,
        shard.Config(
            pools={
                "reasoning": shard.Pool(("high",), ("reasoning", "code")),
                "high": shard.Pool(("high",)),
                "medium": shard.Pool(("medium",)),
            },
            vocabulary=166_144,
            tokenizer_bytes=10_000_000_000,
        ),
        {"documents": mixture},
    )
    # the released 3B: 32 layers, width 2560, 20 query and 4 key/value heads of 128, FFN 10496, untied
    shape = pretrain.Shape(width=2560, layers=32, heads=20, kv_heads=4, ffn=10_496, head_size=128, tied=False)
    base = Step(
        "base",
        pretrain,
        pretrain.Config(
            phases=timeline(scale).phases,
            shape=shape,
            optimizer=OptimizerConfig(kind="adamw", weight_decay=0.1),  # open
            batch_tokens=8_388_608,  # open
            microbatch_tokens=65_536,
            epochs=2.5,
            save_every_steps=1000,
            dtype="bfloat16",
        ),
        {"shards": shards},
    )

    def of(samples: int) -> int:
        return max(1, round(samples * scale))

    # section 3.1: cold start, 30M samples at 32K: half mathematics, 30% science, 20% code
    cold_start = Step(
        "cold_start",
        sft,
        sft.Config(
            data=(
                ConversationFiles("data/sft/cold/math/*.jsonl", source="math", most=of(15_000_000)),
                ConversationFiles("data/sft/cold/science/*.jsonl", source="science", most=of(9_000_000)),
                ConversationFiles("data/sft/cold/code/*.jsonl", source="code", most=of(6_000_000)),
            ),
            context=32_768,
            batch_tokens=4_194_304,  # open
            microbatch_tokens=65_536,
            learning_rate=4e-5,  # open
            optimizer=OptimizerConfig(kind="adamw"),
            dtype="bfloat16",
        ),
        {"model": base},
    )
    # section 3.2: overall SFT at 64K: 40% mathematics and subjects, 30% general, 20% agents, 10% code. Tool calls and
    # flawed turns stand in the conversations themselves (text/conversations.py). The number of samples is open.
    overall = Step(
        "sft",
        sft,
        sft.Config(
            data=(
                ConversationFiles("data/sft/overall/reasoning/*.jsonl", source="reasoning", most=of(4_000_000)),
                ConversationFiles("data/sft/overall/general/*.jsonl", source="general", most=of(3_000_000)),
                ConversationFiles("data/sft/overall/agent/*.jsonl", source="agent", most=of(2_000_000)),
                ConversationFiles("data/sft/overall/code/*.jsonl", source="code", most=of(1_000_000)),
            ),
            context=65_536,
            batch_tokens=4_194_304,  # open
            microbatch_tokens=65_536,
            learning_rate=2e-5,  # open
            optimizer=OptimizerConfig(kind="adamw"),
            dtype="bfloat16",
        ),
        {"model": cold_start},
    )
    return Recipe("nanbeige4_3b", overall, seed=seed)


EVALUATION = Limits(max_new_tokens=65_536, temperature=0.6, top_p=0.95)
"""Section 6: how the report decodes."""
