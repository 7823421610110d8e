"""Twenty CPU training steps: losses that change only in a commit that says why.

A model of 2 layers learns to count modulo 13 from packed documents, with Muon, weight decay, a phase change with a new
RoPE base and context, and two microbatches a step.
"""

from pathlib import Path

import numpy as np
import pytest

from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.next_token import NextToken
from upweight.store.shards import Shards, ShardWriter
from upweight.train.loader import MixtureLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Phase, Timeline
from upweight.train.trainer import train

LOSSES = [2.5624, 2.5612, 2.4882, 2.3943, 2.3257, 2.2375, 2.1636, 2.0992, 2.0318, 1.9554]
LOSSES += [1.8925, 1.8357, 1.777, 1.7442, 1.7135, 1.7009, 1.675, 1.6529, 1.6406, 1.6397]


def test_twenty_steps(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "count", vocab_size=13)
    for number in range(200):
        start, length = int(random.integers(13)), int(random.integers(10, 60))
        writer.write([(start + n) % 13 for n in range(length)], source="count", document_id=str(number))
    writer.close()
    timeline = Timeline(
        [
            Phase("warmup", 512, 0.0, 0.02, {"count": 1.0}, 32, 1e4),
            Phase("stable", 2048, 0.02, 0.02, {"count": 1.0}, 32, 1e4, "constant"),
            Phase("decay", 2560, 0.02, 0.0, {"count": 1.0}, 64, 4e4, "sqrt"),
        ]
    )
    model = make_model(ModelConfig(vocab_size=13, width=32, layers=2, heads=2, kv_heads=1, ffn=64), 0)
    loader = MixtureLoader(
        {"count": Shards.open(tmp_path / "count")}, timeline, seed=1, batch_tokens=256, microbatch_tokens=128
    )
    optimizer = OptimizerConfig(rest_scale=0.15, weight_decay=0.1)
    reports = list(train(model, objective=NextToken(), loader=loader, timeline=timeline, optimizer=optimizer))
    assert model.config.rope_base == 4e4
    losses = [report.loss for report in reports]
    print([round(loss, 4) for loss in losses])  # shown where the comparison fails
    assert losses == pytest.approx(LOSSES, abs=2e-3)
