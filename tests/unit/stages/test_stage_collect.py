"""collect: problems of one's own, split for good into training and evaluation."""

import json
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Problem
from upweight.core.work import Work
from upweight.stages import collect
from upweight.store.jsonl import read_jsonl


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict[str, object]]:
    return [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(count)]


def test_a_share_is_held_back_by_what_is_asked(tmp_path: Path) -> None:
    files = {"stem": written(tmp_path / "a.jsonl", sums(400)), "few": written(tmp_path / "b.jsonl", sums(200)[::-1])}
    out = tmp_path / "out"
    out.mkdir()
    summary = collect.run(collect.Config(files, reserved_share=0.25), Work(out, {}))
    kept, held = (read_jsonl(out / f"{part}stem.jsonl", Problem) for part in ("", "reserved_"))
    assert len(kept) + len(held) == 400
    # 400 draws at 0.25: 100 with a standard deviation of 8.7
    assert 65 < len(held) < 135
    assert not {problem.id for problem in kept} & {problem.id for problem in held}
    # the same question falls on the same side of another file, in whatever order
    few = {problem.id for problem in read_jsonl(out / "reserved_few.jsonl", Problem)}
    assert few == {problem.id for problem in held if int(problem.answer or 0) <= 200}
    assert summary["stem"]["kind"] == "answer"
    assert summary["stem"]["training"] == len(kept)


def test_nothing_held_back_where_nothing_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tests = [{"question": "Write f.", "tests": ["assert f() == 1"]}]
    summary = collect.run(collect.Config({"code": written(tmp_path / "c.jsonl", tests)}, 0.0), Work(out, {}))
    assert summary["code"]["kind"] == "code"
    assert len(read_jsonl(out / "code.jsonl", Problem)) == 1
    assert read_jsonl(out / "reserved_code.jsonl", Problem) == []


def test_what_cannot_be_split_or_read_is_refused(tmp_path: Path) -> None:
    one = written(tmp_path / "one.jsonl", sums(1))
    with pytest.raises(UserError, match=r"holds 1 problems: . were held back"):
        collect.run(collect.Config({"stem": one}, 0.5), Work(tmp_path, {}))
    broken = written(tmp_path / "broken.jsonl", [{"question": "?"}])
    with pytest.raises(UserError, match="neither an answer nor tests"):
        collect.run(collect.Config({"stem": broken}), Work(tmp_path, {}))
    with pytest.raises(UserError, match="expected a share"):
        collect.Config({"stem": one}, 1.5)
    with pytest.raises(UserError, match="name at least one"):
        collect.Config({"Stem/x": one})
