"""Contract 7: the mixture that was trained is the one that was asked for, counted in what the model was given to read.

Put back on purpose, each fails here: drawing documents (not tokens) in the shares of the mixture (axolotl#1508),
keeping the first phase's mixture, rows that straddle two phases.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from upweight.core.batches import PADDING, Loss, TokenBatch
from upweight.core.protocols import Objective
from upweight.store.shards import Shards, ShardWriter
from upweight.train.loader import MixtureLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Phase, Timeline
from upweight.train.trainer import train

# pools of very different document lengths: counting documents instead of tokens would be far off
LENGTHS = {"short": (8, 400), "long": (90, 40), "middle": (30, 100)}
TIMELINE = Timeline(
    [
        Phase("warmup", 1_000, 0.0, 1.0, {"short": 0.5, "long": 0.5}, 32, 0.0),
        Phase("stable", 4_001, 1.0, 1.0, {"short": 0.2, "long": 0.5, "middle": 0.3}, 32, 0.0),
        Phase("decay", 2_500, 1.0, 0.1, {"long": 0.05, "middle": 0.95}, 64, 0.0),
    ]
)


class Counting(Objective):
    """Counts what it is given, by the learning rate's phase and by pool; each pool's tokens say which it is."""

    def __init__(self) -> None:
        self.seen: list[Counter[int]] = []

    def __call__(self, policy: nn.Module, batch: TokenBatch) -> Loss:
        self.seen.append(Counter(batch.tokens[batch.segments != PADDING].tolist()))
        weight: Tensor = next(policy.parameters())
        return Loss(weight.sum() * 0, torch.tensor(1.0))


@pytest.mark.parametrize("whole", [True, False])
def test_consumed_tokens_reconcile_with_the_plan(tmp_path: Path, whole: bool) -> None:
    random = np.random.default_rng(0)
    pools: dict[str, Shards] = {}
    for number, (name, (mean, count)) in enumerate(LENGTHS.items()):
        writer = ShardWriter(tmp_path / name, vocab_size=10)
        for document in range(count):
            length = int(random.integers(mean // 2, 2 * mean))
            writer.write([number] * length, source=f"{name}-{document % 3}", document_id=f"{name}{document}")
        writer.close()
        pools[name] = Shards.open(tmp_path / name)
    make: dict[str, Any] = {"seed": 1, "batch_tokens": 256, "microbatch_tokens": 64, "whole_documents": whole}
    loader = MixtureLoader(pools, TIMELINE, **make)
    counting = Counting()
    seen: dict[str, Counter[int]] = {phase.name: Counter() for phase in TIMELINE.phases}
    running: list[tuple[str, Counter[int]]] = []
    for report in train(
        nn.Linear(1, 1), objective=counting, loader=loader, timeline=TIMELINE, optimizer=OptimizerConfig(kind="adamw")
    ):
        here = sum(counting.seen, Counter())
        counting.seen.clear()
        assert sum(here.values()) == report.tokens <= 256 + 90  # whole documents may overrun a step a little
        seen[report.phase] += here
        running.append((report.phase, seen[report.phase].copy()))
    names = list(LENGTHS)
    for phase in TIMELINE.phases:
        consumed = {names[token]: count for token, count in seen[phase.name].items()}
        assert sum(consumed.values()) == phase.tokens  # the phase ends exactly where the plan ends it
        for pool, share in phase.mixture.items():
            assert abs(consumed.get(pool, 0) - share * phase.tokens) <= (phase.context if whole else 1)
        by_ledger = {pool: sum(sources.values()) for pool, sources in loader.ledger()[phase.name].items()}
        assert by_ledger == consumed  # the ledger is what the model read
    shares = {phase.name: phase.mixture for phase in TIMELINE.phases}
    for phase_name, counts in running:  # the shares hold all along, not only at the end
        total = sum(counts.values())
        for pool, share in shares[phase_name].items():
            assert abs(counts[names.index(pool)] - share * total) <= 64 + 1
    # documents of one pool are drawn alike whatever their source
    by_source = Counter[str]()
    for by_pool in loader.ledger().values():
        by_source.update(by_pool.get("short", {}))
    expected = pools["short"].tokens_by_source()
    total = sum(by_source.values())
    for source, tokens in expected.items():
        assert by_source[source] / total == pytest.approx(
            tokens / pools["short"].tokens, abs=0.12
        )  # 130 documents: 3 standard errors
