"""Every base is tuned alike, and a base that was tuned is not tuned again."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_checkpoint import tiny_checkpoint

from upweight.app.compare import Tuning, compare_bases, comparison
from upweight.app.measure import Decoding
from upweight.core.errors import UserError
from upweight.core.work import Machine

TUNING = Tuning(samples=4, context=64, batch_tokens=128, microbatch_tokens=128, learning_rate=1e-2)


def chats(folder: Path, name: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 3?"}, {"role": "assistant", "content": str(i + 3)}]}
        for i in range(8)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{name}.jsonl")


def test_bases_on_two_sets(tmp_path: Path) -> None:
    bases = [str(tiny_checkpoint(tmp_path / name, seed)) for seed, name in enumerate(["one", "two"])]
    (tmp_path / "own.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n')
    given = {
        "tuning": TUNING,
        "root": tmp_path / "runs",
        "name": "bases",
        "out": tmp_path / "evals",
        "machine": Machine(),
        "k": 2,
        "decoding": Decoding(max_new_tokens=4),
    }
    sets = [chats(tmp_path, "sums"), chats(tmp_path, "more")]
    console = Console(file=io.StringIO(), width=150)
    table = compare_bases(bases, sets, [str(tmp_path / "own.jsonl")], console=console, **given)
    assert [row["checkpoint"] for row in table["rows"]] == [
        "bases:one.sums",
        "bases:two.sums",
        "bases:one.more",
        "bases:two.more",
    ]
    compared = {(row["before"], row["after"]) for row in table["differences"]}
    assert {("bases:one.sums", "bases:two.sums"), ("bases:one.more", "bases:two.more")} <= compared
    manifests = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "runs" / "bases").glob("*.sums/manifest.json"))
    ]
    configs = [manifest["identity"]["config"] for manifest in manifests]
    assert configs[0] == configs[1]  # the same settings for every base
    assert {manifest["summary"]["first_loss"] for manifest in manifests} != {0}
    again = Console(file=io.StringIO(), width=150)
    assert compare_bases(bases, sets, [str(tmp_path / "own.jsonl")], console=again, **given) == table
    assert "samples/s" not in again.file.getvalue() or "0/s" in again.file.getvalue()


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    bases = [str(tiny_checkpoint(tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "own.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n')
    own, sums, nowhere = str(tmp_path / "own.jsonl"), chats(tmp_path, "sums"), str(tmp_path / "nowhere.jsonl")
    for sets, on, given, told in (
        ([sums], ["gsm9k"], {}, "there is no benchmark"),
        ([sums], [nowhere], {}, "nowhere.jsonl does not exist"),
        ([sums, nowhere], [own], {}, "no file matches"),
        ([sums], [own], {"k": -1}, "k is -1"),
        ([sums], [own], {"decoding": Decoding(max_new_tokens=0)}, "max_new_tokens is 0"),
    ):
        where = {"root": tmp_path / "runs", "name": "bases", "out": tmp_path / "evals", "machine": Machine()}
        with pytest.raises(UserError, match=told):
            compare_bases(bases, sets, on, tuning=TUNING, console=Console(file=io.StringIO()), **where, **given)
        assert not (tmp_path / "runs").exists()


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = str(tiny_checkpoint(tmp_path / "one"))
    with pytest.raises(UserError, match="at least two bases"):
        comparison([one], ["x.jsonl"], TUNING, root=tmp_path, name="bases", seed=0)
    with pytest.raises(UserError, match="small is a recipe"):
        comparison([one, one], ["x.jsonl"], TUNING, root=tmp_path, name="small", seed=0)
    with pytest.raises(UserError, match="same last name"):
        comparison([one, one], ["x.jsonl"], TUNING, root=tmp_path, name="bases", seed=0)
