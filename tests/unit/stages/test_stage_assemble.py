"""assemble: shares by tokens and by samples, what is dropped and why; exemplify: examples for a writer of chains."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from small_models import checkpoint, work

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Conversation, Message, Problem
from upweight.stages import assemble, exemplify
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize import stories
from upweight.synthesize.accuracy import Checks
from upweight.synthesize.structured import NeverInForm
from upweight.synthesize.talks import Part

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron"]


def talk(source: str, number: int, answer: str = "", thought: str = "") -> Conversation:
    """Conversations that share few words, of lengths that differ."""
    words = [WORDS[(number * 7 + place * (3 + number % 5)) % 8] + str(number * 31 + place) for place in range(12)]
    said = answer or f"{' '.join(words[:3])}: \\boxed{{{number}}}"
    said = f"<think>\n{thought}\n</think>\n{said}" if thought else said
    return Conversation((Message("user", f"{source}: {' '.join(words)}?"), Message("assistant", said)), source)


@dataclass(frozen=True)
class Judge(Sampler):
    """Finds numbers of ten and more inaccurate; or only ever babbles."""

    babbles: bool = False

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [[Completion((), (), self._say(prompt), "end", "judge")] for prompt in prompts]

    def _say(self, prompt: Prompt) -> str:
        assert not isinstance(prompt, str)
        low = "{1" in prompt[0].content.partition("<answer>")[2]
        return "well well" if self.babbles else json.dumps({"score": 2 if low else 9, "reason": "it is about ten"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "math.jsonl", [talk("math", number) for number in range(2, 42)])
    write_jsonl(folder / "code.jsonl", [talk("code", number) for number in range(50, 80)])
    return folder


@pytest.fixture
def inputs(tmp_path: Path, data: Path) -> dict[str, Path]:
    return {"model": checkpoint(tmp_path / "made", context=512), "data": data}


MATH, CODE = Part("data/math.jsonl"), Part("data/code.jsonl")
PARTS = {"math": assemble.Share((MATH,), 0.75), "code": assemble.Share((CODE,), 0.25)}


def test_shares_are_of_tokens_or_of_samples(tmp_path: Path, inputs: dict[str, Path]) -> None:
    asked = work(tmp_path / "tokens", inputs)
    told = assemble.run(assemble.Config(PARTS), asked)
    for name, part in PARTS.items():
        assert told["ledger"][name]["share"] == pytest.approx(part.share, abs=0.03)
    assert told["ledger"]["math"]["samples"] >= 38  # the scarcest part is taken whole, to half a conversation
    talks = read_jsonl(asked.out / "conversations.jsonl", Conversation)
    assert len(talks) == told["samples"]
    by_samples = assemble.run(assemble.Config(PARTS, by="samples", total=20), work(tmp_path / "samples", inputs))
    assert [by_samples["ledger"][name]["samples"] for name in PARTS] == [15, 5]
    assert by_samples["ledger"]["math"]["by_source"] == {"math": 15}
    with pytest.raises(UserError, match=r"a set of 100 samples cannot be had.*it can have 53"):
        assemble.run(assemble.Config(PARTS, by="samples", total=100), work(tmp_path / "more", inputs))
    with pytest.raises(UserError, match="sum to 1"):
        assemble.Config({"math": assemble.Share((MATH,), 0.5)})


def test_what_may_not_be_imitated_is_dropped_by_name(tmp_path: Path, data: Path, inputs: dict[str, Path]) -> None:
    problems = tmp_path / "problems"
    problems.mkdir()
    known = [talk("math", number) for number in (2, 3)]
    posed = [
        Problem(str(n), one.messages[:-1], answer) for n, (one, answer) in enumerate(zip(known, "29", strict=True))
    ]
    write_jsonl(problems / "stem.jsonl", posed)
    write_jsonl(problems / "reserved_stem.jsonl", [Problem("held", talk("math", 4).messages[:-1], "4")])
    good = talk("math", 90)
    odd = [
        talk("math", 91, thought="so \\boxed{7}"),  # and the answer says 91
        talk("math", 92, answer="<think>\nnever ends"),
        talk("math", 93, thought="hm", answer=" "),
        good,
        good,
        replace(good, messages=(good.messages[0], Message("assistant", good.messages[1].content + " !"))),
        talk("math", 94, answer="long " * 400),
    ]
    write_jsonl(data / "odd.jsonl", odd)
    parts = {"math": assemble.Share((MATH, Part("data/odd.jsonl")), 1.0)}
    config = assemble.Config(parts, context=512, answers=("stem.jsonl",))
    asked = work(tmp_path / "set", {**inputs, "problems": problems})
    told = assemble.run(config, asked)
    assert told["dropped"] == {
        "verified wrong": 1,
        "holds a problem of the evaluation": 1,
        "thought and answer disagree": 1,
        "the thought never ends": 1,
        "nothing is said": 1,
        "the same as an earlier one": 1,
        "nearly the same as an earlier one": 1,
        "longer than the context": 1,
    }
    assert told["ledger"]["math"]["verified"] == 1
    assert sum(1 for _ in (asked.out / "dropped.jsonl").open()) == 8
    assert not (asked.out / "blocks").exists()


def test_a_judge_drops_what_it_finds_inaccurate(tmp_path: Path, inputs: dict[str, Path]) -> None:
    parts = {"math": assemble.Share((MATH,), 1.0)}
    told = assemble.run(assemble.Config(parts, judge=Judge()), work(tmp_path / "set", inputs))
    assert told["dropped"] == {"judged inaccurate": 10}  # 10 to 19
    with pytest.raises(NeverInForm, match=r"judge of accuracy.*well well"):
        assemble.run(assemble.Config(parts, judge=Judge(babbles=True)), work(tmp_path / "babble", inputs))
    with pytest.raises(UserError, match=r"accuracy has no place \{\{answer\}\}"):
        Checks(prompt="Is it right? {{problem}}")


def test_right_traces_teach_to_write_chains(tmp_path: Path) -> None:
    folder = tmp_path / "problems"
    folder.mkdir()
    told = [stories.conversation(stories.story(0, index)) for index in range(6)]
    wrong = replace(
        told[0], messages=(told[0].messages[0], Message("assistant", "<think>\n1+1=2\n</think>\n\\boxed{7}"))
    )
    bare = replace(told[0], messages=(told[0].messages[0], Message("assistant", "\\boxed{7}")))
    write_jsonl(folder / "gold.jsonl", [*told, wrong, bare])
    made = work(tmp_path / "examples", {"problems": folder})
    summary = exemplify.run(exemplify.Config((Part("problems/gold.jsonl"),)), made)
    assert (summary["examples"], summary["dropped"]) == (6, {"another answer": 1, "no closed thought": 1})
    asked, written = read_jsonl(made.out / "conversations.jsonl", Conversation)[0].messages
    assert asked.content.startswith("Task: chain\n")
    assert "Solution: \\boxed{" in asked.content
    assert written.content.startswith("<chain>\n")
    write_jsonl(folder / "gold.jsonl", [bare])
    with pytest.raises(UserError, match="no trace can teach"):
        exemplify.run(exemplify.Config((Part("problems/gold.jsonl"),)), made)
