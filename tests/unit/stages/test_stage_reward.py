"""reward: what it measures on pairs that it did not train on."""

from pathlib import Path

import pytest
from small_models import checkpoint, work

from upweight.core.records import Completion, Message, Pair, Problem
from upweight.stages import reward
from upweight.store.jsonl import write_jsonl
from upweight.train.optimizer import OptimizerConfig


def said(text: str) -> Completion:
    return Completion((), (), text, "end", "by hand")


@pytest.mark.parametrize(("chosen", "rejected", "longer"), [("sure", "it is 42.", None), ("it is 42.", "sure", 1.0)])
def test_what_no_pair_shows_is_not_said(tmp_path: Path, chosen: str, rejected: str, longer: float | None) -> None:
    (tmp_path / "pairs").mkdir()
    pairs = [
        Pair(Problem(str(n), (Message("user", f"what is {n}?"),)), said(chosen), said(rejected)) for n in range(16)
    ]
    write_jsonl(tmp_path / "pairs" / "pairs.jsonl", pairs)
    inputs = {"model": checkpoint(tmp_path / "checkpoint"), "pairs": tmp_path / "pairs"}
    config = reward.Config(
        heldout_share=0.5, epochs=8, pairs_a_step=4, learning_rate=0.02, optimizer=OptimizerConfig(kind="adamw")
    )
    summary = reward.run(config, work(tmp_path / "out", inputs))
    assert summary["pairs"] + summary["heldout_pairs"] == 16
    assert summary["heldout_accuracy"] == 1.0
    # where the chosen response is longer in no pair, nothing is known of such pairs
    assert summary["accuracy_where_chosen_is_longer"] == longer
