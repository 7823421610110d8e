"""pose: counts kept, reserved problems apart, coding problems validated in the sandbox, the same bytes again."""

from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Conversation, Pair, Problem
from upweight.core.work import Silent, Work
from upweight.stages import pose
from upweight.store.jsonl import read_jsonl
from upweight.synthesize import pipelines, stories
from upweight.synthesize.reading import read

SMALL = pose.Config(
    stem=20,
    code=4,
    preference=10,
    reserved_stem=12,
    reserved_code=2,
    gold_stem=3,
    gold_code=2,
    preference_pairs=15,
    most_operations=2,
)
FILES = ("stem", "code", "preference", "reserved_stem", "reserved_code", "gold", "preference_pairs")


def test_pose_writes_what_was_asked_for_twice_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        summary = pose.run(SMALL, Work(out=tmp_path / name, inputs={}, seed=5))
    for file in FILES:
        assert (tmp_path / "one" / f"{file}.jsonl").read_bytes() == (tmp_path / "two" / f"{file}.jsonl").read_bytes()
    problems = {name: read_jsonl(tmp_path / "one" / f"{name}.jsonl", Problem) for name in FILES[:5]}
    assert {name: len(found) for name, found in problems.items()} == {
        "stem": 20,
        "code": 4,
        "preference": 10,
        "reserved_stem": 12,
        "reserved_code": 2,
    }
    ids = [one.id for found in problems.values() for one in found]
    assert len(set(ids)) == len(ids)
    for name, found in problems.items():
        reserved = pipelines.reserved if "code" in name else stories.reserved
        assert all(reserved(one.messages[0].content) == name.startswith("reserved") for one in found)
    assert all(one.tests and one.answer is None for one in problems["code"])
    # three stories and two programs, evenly mixed: floor(2 i / 5) grows at the third and the fifth
    gold = read_jsonl(tmp_path / "one" / "gold.jsonl", Conversation)
    assert [talk.source.removeprefix("gold-") for talk in gold] == ["stem", "stem", "code", "stem", "code"]
    assert len(read_jsonl(tmp_path / "one" / "preference_pairs.jsonl", Pair)) == 15
    assert summary["examples"]["stem"][0].startswith(problems["stem"][0].messages[0].content)


def test_the_range_of_values_holds_for_everything_that_is_posed(tmp_path: Path) -> None:
    config = pose.Config(
        stem=20, code=0, preference=20, reserved_stem=10, reserved_code=0, gold_stem=20, gold_code=0, largest_value=9
    )
    pose.run(config, Work(out=tmp_path, inputs={}))
    for file in FILES:
        kind: type = {"gold": Conversation, "preference_pairs": Pair}.get(file, Problem)
        for record in read_jsonl(tmp_path / f"{file}.jsonl", kind):
            question = record.problem.messages[0] if isinstance(record, Pair) else record.messages[0]
            told = read(question.content)
            assert told is not None
            assert int(told.answer) <= 9


def test_another_seed_poses_other_problems(tmp_path: Path) -> None:
    config = pose.Config(stem=5, code=0, preference=0, reserved_stem=5, reserved_code=0, preference_pairs=0)
    found = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        pose.run(config, Work(out=tmp_path / str(seed), inputs={}, seed=seed))
        found.append({one.id for one in read_jsonl(tmp_path / str(seed) / "stem.jsonl", Problem)})
    assert not found[0] & found[1]


def test_a_domain_that_runs_out_is_an_error(tmp_path: Path) -> None:
    # one operation: about 100 statements in all, a sixteenth of them reserved
    config = pose.Config(stem=0, code=0, preference=0, reserved_stem=0, reserved_code=12, most_operations=1)
    with pytest.raises(UserError, match=r"programs of 1 to 1 operations.*ask for fewer"):
        pose.run(config, Work(out=tmp_path, inputs={}, monitor=Silent()))
