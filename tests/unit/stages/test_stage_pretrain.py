"""pretrain: what was consumed against the plan, going on from another checkpoint, and pools that do not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import checkpoint, work

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.model import weights
from upweight.stages import pretrain
from upweight.store.jsonl import write_jsonl
from upweight.store.shards import ShardWriter
from upweight.text.tokenizer import Tokenizer
from upweight.train.timeline import Phase

PHASES = (
    Phase("stable", 600, 0.02, 0.02, {"high": 0.25, "medium": 0.75}, 64, 1e4, "constant"),
    Phase("decay", 400, 0.02, 0.0, {"high": 1.0}, 96, 4e4),
)
CONFIG = pretrain.Config(
    phases=PHASES,
    shape=pretrain.Shape(width=16, layers=1, heads=2, kv_heads=1, ffn=24),
    batch_tokens=192,
    microbatch_tokens=96,
    save_every_steps=2,
)


def shards(directory: Path) -> Path:
    tokenizer = Tokenizer.load(checkpoint(directory / "tokenizer of") / "model")
    tokenizer.save(directory / "tokenizer")
    counts = {}
    for pool in ("high", "medium"):
        writer = ShardWriter(directory / "shards" / pool, vocab_size=tokenizer.vocab_size)
        for number in range(40):
            tokens = [*tokenizer.encode(f"{pool} {number} + {number} is {2 * number}"), tokenizer.end_of_text]
            writer.write(tokens, source=f"{pool}-web", document_id=f"{pool}{number}", tier=pool)
        writer.close()
        counts[pool] = {f"{pool}-web": {"documents": 40}}
    (directory / "pools.json").write_text(json.dumps(counts))
    write_jsonl(directory / "heldout.jsonl", [Document("x", "high 3 + 3 is 6", "high-web")])
    return directory


def test_consumed_tokens_are_those_of_the_plan(tmp_path: Path) -> None:
    inputs = {"shards": shards(tmp_path / "shards")}
    summary = pretrain.run(CONFIG, work(tmp_path / "base", inputs))
    assert summary["tokens"] == 1000
    for phase, by_pool in summary["consumed"].items():
        for pool, by_source in by_pool.items():
            assert abs(sum(by_source.values()) - summary["planned"][phase][pool]) <= 48  # half of the longest row
    assert sum(row["tokens"] for row in summary["accounts"]) == 1000
    assert {(row["pool"], row["tier"], row["source"]) for row in summary["accounts"]} == {
        ("high", "high", "high-web"),
        ("medium", "medium", "medium-web"),
    }
    shape = weights.read_config(tmp_path / "base" / "model")
    assert (shape.rope_base, shape.max_context) == (4e4, 96)
    # a run goes on from its checkpoint, and from one of another run
    inputs |= {"init": tmp_path / "base"}
    again = pretrain.run(replace(CONFIG, phases=PHASES[1:]), work(tmp_path / "on", inputs))
    assert again["final_loss"] < summary["final_loss"]


def test_a_run_killed_while_it_is_measured_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"shards": shards(tmp_path / "shards")}
    straight = pretrain.run(CONFIG, work(tmp_path / "straight", inputs))
    killed = work(tmp_path / "killed", inputs)

    def dies(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(pretrain, "bits_per_byte", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(CONFIG, killed)
    assert list((killed.out / "checkpoints").glob("step-*"))
    assert pretrain.run(CONFIG, killed) == straight
    assert not killed.monitor.rows[straight["steps"] :]  # type: ignore[attr-defined]


def test_phases_without_a_rope_base_have_the_usual_one(tmp_path: Path) -> None:
    phases = tuple(replace(phase, rope_base=0.0) for phase in PHASES)
    summary = pretrain.run(replace(CONFIG, phases=phases), work(tmp_path / "o", {"shards": shards(tmp_path / "s")}))
    assert summary["tokens"] == 1000
    assert weights.read_config(tmp_path / "o" / "model").rope_base == 10_000


def test_a_checkpoint_of_too_few_embeddings_is_refused(tmp_path: Path) -> None:
    inputs = {"shards": shards(tmp_path / "shards"), "init": checkpoint(tmp_path / "few", extra=-1)}
    with pytest.raises(UserError, match=r"290 tokens, but the model .* has embeddings for 289"):
        pretrain.run(CONFIG, work(tmp_path / "base", inputs))


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    inputs = {"shards": shards(tmp_path / "shards"), "init": checkpoint(tmp_path / "base")}
    # as many tokens, but others
    other = Tokenizer.train(["no other words, at all times: 9 8 7; under the moon lie lakes\n"] * 20, 290)
    assert other.vocab_size == Tokenizer.load(tmp_path / "base" / "model").vocab_size
    other.save(tmp_path / "base" / "model")
    with pytest.raises(UserError, match=r"another tokenizer than that of the checkpoint .*base/model"):
        pretrain.run(CONFIG, work(tmp_path / "on", inputs))


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    directory = shards(tmp_path / "shards")
    Tokenizer.train(["what is it? the tool says so"] * 9, 280).save(directory / "tokenizer")
    with pytest.raises(UserError, match=r"written for a vocabulary of 290 tokens, the model has 280"):
        pretrain.run(CONFIG, work(tmp_path / "base", {"shards": directory}))
