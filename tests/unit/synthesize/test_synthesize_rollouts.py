"""Judged groups, plain and with tools: what of them is trained."""

from collections.abc import Mapping
from typing import Any

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt
from upweight.core.records import Message, Problem
from upweight.objectives.grpo import Grpo
from upweight.rollout.episode import Tool
from upweight.rollout.scripted import ScriptedSampler
from upweight.synthesize.rollouts import Group, Tools, gather
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer
from upweight.verify.answers import AnswerVerifier

PROBLEM = Problem("p", (Message("user", "What is 2 + 3?"),), answer="5")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def add(arguments: Mapping[str, Any]) -> str:
    return f"sum {arguments['a'] + arguments['b']}"


ADD = Tool("add", "Adds.", {"type": "object"}, add)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 2 + 3? sum 5 The answer is"] * 10, 300, chat_template=CHATML)


def says(prompt: Prompt, sample: int) -> str:
    """The first sample asks the tool and then answers; the second answers at once, and wrongly."""
    if isinstance(prompt, str) or prompt[-1].role == "tool":
        return "The answer is 5"
    return CALL if sample == 0 else "The answer is 6"


def test_a_plain_group(tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler({"*": ["The answer is 5", "The answer is 6"]}, tokenizer=tokenizer)
    (group,) = gather(sampler, tokenizer, AnswerVerifier(), [PROBLEM], count=2, limits=Limits(40))
    assert [verdict.score for verdict in group.rollout.verdicts] == [1, 0]
    for completion, (only,) in zip(group.rollout.completions, group.sequences, strict=True):
        assert only.completion is completion
        assert list(only.prompt) == render(tokenizer, PROBLEM.messages)
        assert all(only.wrote)


def test_of_an_episode_what_the_policy_wrote_is_trained_and_the_tools_words_are_not(tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(says, tokenizer=tokenizer)
    (group,) = gather(
        sampler, tokenizer, AnswerVerifier(), [PROBLEM], count=2, limits=Limits(80), tools=[ADD], most_turns=3
    )
    assert [verdict.score for verdict in group.rollout.verdicts] == [1, 0]  # judged by the last turn
    called, plain = group.sequences
    (whole,) = called
    told = list(zip(whole.completion.tokens, whole.wrote, strict=True))
    text = tokenizer.decode(token for token, own in told if own)
    assert CALL in text
    assert "The answer is 5" in text
    assert "sum 5" not in text
    context = tokenizer.decode(
        token for token, own in zip(whole.completion.tokens, whole.wrote, strict=True) if not own
    )
    assert "sum 5" in context
    assert all(plain[0].wrote)
    # the endpoint told no log-probabilities: that is said, and not taken for certainty
    with pytest.raises(UserError, match="has no log-probabilities"):
        Grpo().batches([(one.prompt, one.completion, 1.0, one.wrote) for one in called], row_tokens=500)


def test_an_episode_without_an_end_is_truncated_in_all_its_parts(tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(lambda prompt, sample: CALL, tokenizer=tokenizer)
    (group,) = gather(
        sampler, tokenizer, AnswerVerifier(), [PROBLEM], count=1, limits=Limits(80), tools=[ADD], most_turns=2
    )
    assert group.rollout.verdicts[0].reason == "truncated"
    assert all(one.completion.truncated for one in group.sequences[0])
    (batch,) = Grpo().batches([(one.prompt, one.completion, 1.0) for one in group.sequences[0]], row_tokens=500)
    assert batch.token_count == 0


def test_an_episode_without_room_for_another_turn_is_truncated(tokenizer: Tokenizer) -> None:
    """What a tool returns must not end a run: a sampler refuses what its context has no room for."""
    long = Tool("add", "Adds.", {}, lambda arguments: "5 " * 100)
    sampler = ScriptedSampler(says, tokenizer=tokenizer)

    def made(context: int) -> Group:
        (group,) = gather(
            sampler,
            tokenizer,
            AnswerVerifier(),
            [PROBLEM],
            count=2,
            limits=Limits(80),
            tools=[long],
            most_turns=3,
            context=context,
        )
        return group

    whole = made(0)
    assert [one.truncated for one in whole.rollout.completions] == [False, False]
    ((only,), _) = whole.sequences
    answered = len(tokenizer.encode("The answer is 5")) + 1
    needed = len(only.prompt) + len(only.completion.tokens) - answered + 80
    assert made(needed).rollout == whole.rollout
    short = made(needed - 1)
    assert [one.truncated for one in short.rollout.completions] == [True, False]
    assert short.rollout.verdicts[0].reason == "truncated"


def test_an_episode_whose_sampler_tells_no_tokens_is_refused() -> None:
    read = Tokenizer.train(["5"], 300, chat_template=CHATML)
    (group,) = gather(
        ScriptedSampler(says), read, AnswerVerifier(), [PROBLEM], count=1, limits=Limits(80), tools=[ADD], most_turns=3
    )
    items = [(one.prompt, one.completion, 1.0, one.wrote) for one in group.sequences[0]]
    with pytest.raises(UserError, match="has a text and no tokens"):
        Grpo().batches(items, row_tokens=500)


def test_tools_are_plain_values() -> None:
    with pytest.raises(UserError, match="at least one turn"):
        Tools(most_turns=0)
