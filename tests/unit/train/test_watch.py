"""What is recorded of each step beside the trainer's report."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from upweight.core.work import Bar, Machine, Silent
from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.next_token import NextToken
from upweight.store.shards import Shards, ShardWriter
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.loader import MixtureLoader
from upweight.train.speed import peak_flops_per_second
from upweight.train.timeline import constant
from upweight.train.trainer import StepReport, train
from upweight.train.watch import watched

SHAPE = ModelConfig(vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, ffn=16)


def reports(tmp_path: Path, keep: CheckpointConfig | None = None) -> Iterator[StepReport]:
    pools = {}
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, vocab_size=16)
        for number in range(30):
            writer.write([number % 16] * 8, source=name, document_id=str(number))
        writer.close()
        pools[name] = Shards.open(tmp_path / name)
    timeline = constant(total=256, lr=0.01, mixture={"a": 0.75, "b": 0.25}, context=16)
    loader = MixtureLoader(pools, timeline, seed=0, batch_tokens=128, microbatch_tokens=64)
    return train(make_model(SHAPE, 0), objective=NextToken(), loader=loader, timeline=timeline, checkpoint=keep)


def test_speed_memory_utilisation_and_shares(tmp_path: Path) -> None:
    monitor = Silent()
    list(watched(reports(tmp_path), monitor, "train", total=256, unit="tokens", machine=Machine()))
    assert len(monitor.rows) == 2
    # one token forwards: 2 (8 (2 (2 + 1) 4 + 3 16) + 16 8) for the matrices, 2 1 2 4 16 for attention over 16 tokens
    forwards = 2 * (8 * (24 + 48) + 128) + 2 * 2 * 4 * 16
    peak = peak_flops_per_second(512, "cpu", "float32")
    for row in monitor.rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] == pytest.approx(3 * row["tokens"] * forwards / row["seconds"] / peak)
        assert 0 < row["mfu"] < 1
        assert row["peak_memory_bytes"] > 10**7
        assert (row["share/a"], row["share/b"]) == (pytest.approx(0.75), pytest.approx(0.25))


def test_without_a_machine_there_is_no_utilisation(tmp_path: Path) -> None:
    monitor = Silent()
    list(watched(reports(tmp_path), monitor, "train", total=256, unit="tokens"))
    assert "mfu" not in monitor.rows[0]


def test_the_bar_of_a_resumed_run_starts_where_the_earlier_one_came_to(tmp_path: Path) -> None:
    class Counting(Silent, Bar):
        """Remembers where bars start and what they are advanced by."""

        seen: tuple[float, ...] = ()

        @contextmanager
        def track(self, label: str, *, total: float | int, unit: str, done: float | int = 0) -> Iterator[Bar]:
            self.seen += (done,)
            yield self

        def advance(self, amount: float | int = 1, **shown: float | int) -> None:
            self.seen += (amount,)

    keep = CheckpointConfig(tmp_path / "kept", every_steps=1)
    whole = Counting()
    run = watched(reports(tmp_path / "one", keep), whole, "train", total=256, unit="tokens")
    first = next(run)
    next(run)  # the first step is saved by now
    run.close()  # type: ignore[attr-defined]
    resumed = Counting()
    list(watched(reports(tmp_path / "two", keep), resumed, "train", total=256, unit="tokens"))
    assert whole.seen == (0, first.consumed, 256 - first.consumed)
    assert resumed.seen == (first.consumed, 256 - first.consumed)
    again = Counting()
    assert list(watched(reports(tmp_path / "three", keep), again, "train", total=256, unit="tokens")) == []
