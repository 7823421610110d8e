"""Chains: what may be imitated and what is dropped, and training pairs for a writer of chains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Conversation, Message, Problem
from upweight.synthesize import stories
from upweight.synthesize.expert import POLICY, RuleBasedExpert
from upweight.synthesize.reconstruct import (
    Bounds,
    Prompts,
    completion_examples,
    conclusion,
    fault_of,
    quotation,
    reconstruct,
    unrefined,
    unwritten,
)
from upweight.synthesize.refine import Loop, accepted, thought_of
from upweight.synthesize.structured import Asking, Cost, NeverInForm
from upweight.synthesize.trail import Candidate, Refined, Trail

SUM = Refined(Problem("sum", (Message("user", "What is 2+3?"),), answer="5"), "\\boxed{5}", 9.0, True, 0, "teacher")


@dataclass(frozen=True)
class Writes(Sampler):
    text: str

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [[Completion((), (), self.text, "end", "scripted")] * count for _ in prompts]


def test_the_expert_writes_the_chain_of_a_refined_story() -> None:
    told = [stories.story(0, index) for index in range(10)]
    refined = [Refined(stories.problem(one), f"\\boxed{{{one.answer}}}", 9.0, True, 1, "x") for one in told]
    expert = RuleBasedExpert()
    made = reconstruct(refined, expert, expert, asking=Asking(), bounds=Bounds(), prompts=Prompts())
    for one, result in zip(told, made, strict=True):
        assert (result.fault, result.chain, result.author) == ("", one.chain, POLICY)
        assert result.conversation("stem").messages == stories.conversation(one).messages


def test_chains_to_compare_with_are_the_drafts_own() -> None:
    draft = Candidate("\\boxed{6}", "m", "draft", 0, (), (), 2.0, thought="2+3=6.")
    better = replace(draft, text="\\boxed{4}", score=3.0, thought="2+3=4.")
    revision = Candidate("\\boxed{5}", "m", "revision", 1, (), (), 9.0)
    trail = Trail(SUM.problem, (), (draft, better, revision), 2, 1, "good enough", "", Cost())
    refined = accepted(trail, Loop())
    assert isinstance(refined, Refined)
    assert unwritten(refined).conversation("x").messages[-1].content == "<think>\n2+3=4.\n</think>\n\\boxed{5}"
    assert unrefined(trail).conversation("x").messages[-1].content == "<think>\n2+3=6.\n</think>\n\\boxed{6}"
    assert unwritten(SUM).fault == "no thought"
    cut = replace(trail, candidates=(replace(draft, text=""),))
    assert unrefined(cut).fault == "never ended"


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("<think>\na b\n</think>\n5", "a b"),
        ("a b\n</think>\n5", "a b"),  # the prompt opened it
        ("<think>\na b", "a b"),
        ("5", ""),
    ],
)
def test_the_thought_of_a_completion(text: str, thought: str) -> None:
    assert thought_of(text) == thought


@pytest.mark.parametrize(
    ("chain", "fault"),
    [
        ("2+3=5.", ""),
        ("2+3 is 5, so \\boxed{5.0}", ""),
        ("2+3=6.", "another answer"),
        ("We add both.", "no answer"),
        ("5", "too short"),
        ("2+3=5. " * 100, "too long"),
        ("The given solution says 5, as 2+3=5.", "speaks of the task"),
        ("2+3=5.</think>", "holds a tag"),
        (
            "Write it as someone who does not know the solution yet and works it out: 5.",
            "quotes the instructions",
        ),
    ],
)
def test_faults(chain: str, fault: str) -> None:
    assert fault_of(chain, SUM, Bounds(longest_characters=300), Prompts())[0] == fault


def test_a_chain_may_repeat_the_problem() -> None:
    # the same eight words stand in the instructions and in the problem: then they are the problem's
    words = "one two three four five six seven eight"
    assert quotation(words, f"do {words}", "", 8) == words
    assert quotation(words, f"do {words}", f"I count {words}", 8) == ""
    assert quotation(words, "one two three four five six seven nine", "", 8) == ""


def test_the_conclusion_is_the_box_or_the_last_number() -> None:
    assert conclusion("1+1=2. 2*3=6.") == "6"
    assert conclusion("So \\boxed{7}, not 8") == "7"
    assert conclusion("nothing") is None


def test_a_writer_that_is_never_in_form_is_an_error() -> None:
    with pytest.raises(NeverInForm, match="writer of chains"):
        reconstruct(
            [SUM], Writes("<summary>x</summary>"), Writes("x"), asking=Asking(), bounds=Bounds(), prompts=Prompts()
        )


def test_right_traces_become_training_pairs_for_a_writer_of_chains() -> None:
    told = stories.story(0, 0)
    bare = Conversation((Message("user", "Hi"), Message("assistant", "Hello")), "x")
    examples = list(completion_examples([stories.conversation(told), bare]))
    assert len(examples) == 1  # the second has no thought
    asked, answered = examples[0].messages
    assert asked.content == f"Task: chain\n{told.question}\nSolution: \\boxed{{{told.answer}}}"
    assert answered.content == f"<chain>\n{told.chain}\n</chain>"
