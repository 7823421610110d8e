"""Scripted replies, tool turns, and what of an episode is trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from upweight.core.errors import IsolationUnavailable, UserError
from upweight.core.protocols import Limits, Prompt
from upweight.core.records import Completion, Message
from upweight.rollout.episode import Tool, ToolError, python_tool, run_episodes, training_sequences
from upweight.rollout.scripted import ScriptedSampler
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer

LIMITS = Limits(200)
ASK = (Message("user", "What is 2 + 3?"),)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        [f"{a} plus {b} is {a + b}" for a in range(30) for b in range(30)], 300, chat_template=CHATML
    )


def add(arguments: Mapping[str, Any]) -> str:
    if "a" not in arguments:
        raise ToolError("a is missing")
    return str(arguments["a"] + arguments["b"])


ADD = Tool("add", "Adds.", {"type": "object"}, add)


def call(arguments: str, name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_scripts_by_prompt_and_by_function(tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler({"hi": ["one", "two"], "*": "other"})
    groups = sampler.sample(["hi", (Message("user", "hi"),), "else"], count=3, limits=LIMITS)
    assert [[c.text for c in group] for group in groups] == [["one", "two", "one"]] * 2 + [["other"] * 3]
    assert groups[0][0].tokens == ()
    by_function = ScriptedSampler(lambda prompt, sample: f"{sample}: stop here", tokenizer=tokenizer)
    cut, stopped = (
        by_function.sample(["x"], count=1, limits=limits)[0][0]
        for limits in (Limits(3), Limits(100, stop=(" here", "zz")))
    )
    assert (len(cut.tokens), cut.stop) == (3, "length")
    assert (stopped.text, stopped.stop) == ("0: stop", "stop")
    whole = by_function.sample(["x"], count=2, limits=LIMITS)[0][1]
    assert whole.tokens[-1] == tokenizer.end_of_turn
    assert tokenizer.decode(whole.tokens[:-1]) == whole.text == "1: stop here"
    with pytest.raises(UserError, match="no reply to 'x'"):
        ScriptedSampler({}).sample(["x"], count=1, limits=LIMITS)


def scripted(*turns: str) -> ScriptedSampler:
    """Turn n of an episode is the n-th text: as many assistant's messages have been said before."""

    def script(prompt: Prompt, sample: int) -> str:
        assert not isinstance(prompt, str)
        return turns[sum(message.role == "assistant" for message in prompt)]

    return ScriptedSampler(script)


def test_an_episode_calls_reads_and_answers() -> None:
    thought = f"<think>{call('{}')}</think>"
    sampler = scripted(thought + "I add. " + call('{"a": 2, "b": 3}'), "It is 5.")
    ((episode, again),) = run_episodes(sampler, [ASK], tools=[ADD], limits=LIMITS, count=2)
    assert [message.role for message in episode.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert '"name": "add"' in episode.messages[0].content
    assert episode.messages[3].content == "5"  # the call in the thought was not made
    assert [place for place, _ in episode.turns] == [2, 4]
    assert (episode.completion.text, episode.stop) == ("It is 5.", "end")
    assert again.messages == episode.messages


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (call("{}"), "error: a is missing"),
        (call("{}", "sub"), "error: there is no function 'sub', only add"),
        ('<tool_call>{"name": ["add"]}</tool_call>', "error: there is no function ['add'], only add"),
        ('<tool_call>{"name": {}}</tool_call>', "error: there is no function {}, only add"),
        (call("[1]"), "error: the arguments of a call are a JSON object"),
        ("<tool_call>add 2 3</tool_call>", 'error: a call is a JSON object {"name": ..., "arguments": {...}}'),
        ("<tool_call>7</tool_call>", 'error: a call is a JSON object {"name": ..., "arguments": {...}}'),
        (call('"{\\"a\\": 1, \\"b\\": 1}"'), "2"),
    ],
)
def test_a_wrong_call_is_answered(asked: str, answer: str) -> None:
    ((episode,),) = run_episodes(scripted(asked, "ok"), [ASK], tools=[ADD], limits=LIMITS)
    assert episode.messages[3] == Message("tool", answer, trained=False)


ODD = ["<think>a</think>b</think>", "<think><think>a</think>", "<think>a</think><think>b", "I <think>a</think>"]


@pytest.mark.parametrize("thought", ODD)
def test_a_call_beside_thoughts_that_templates_do_not_write_back_ends_the_episode(thought: str) -> None:
    asked = thought + call('{"a": 1, "b": 1}')
    ((episode,),) = run_episodes(scripted(asked, "ok"), [ASK], tools=[ADD], limits=LIMITS)
    assert (len(episode.turns), episode.stop) == (1, "end")
    ((other,),) = run_episodes(
        scripted("<think>a</think>" + call('{"a": 1, "b": 1}'), "ok"), [ASK], tools=[ADD], limits=LIMITS
    )
    assert len(other.turns) == 2


def test_a_call_in_a_thought_without_end_is_not_made() -> None:
    asked = "<think>I might say " + call('{"a": 1, "b": 1}')
    ((episode,),) = run_episodes(scripted(asked, "ok"), [ASK], tools=[ADD], limits=LIMITS)
    assert (len(episode.turns), episode.stop) == (1, "end")


@pytest.mark.parametrize("stop", ["</tool_call>", "</tool_call>\n", "}", "call>"])
def test_a_stop_string_that_cuts_calls_short_is_refused(stop: str) -> None:
    limits = replace(LIMITS, stop=("\n\n", stop))
    with pytest.raises(UserError, match="cuts tool calls short"):
        run_episodes(scripted(call("{}"), "ok"), [ASK], tools=[ADD], limits=limits)
    ((episode,),) = run_episodes(scripted("ok"), [ASK], tools=[], limits=limits)
    assert episode.completion.text == "ok"
    other = replace(LIMITS, stop=("\n\n", "\\boxed{"))
    ((episode,),) = run_episodes(scripted("ok"), [ASK], tools=[ADD], limits=other)
    assert episode.completion.text == "ok"


def test_turns_are_bounded_and_endless_callers_count_as_truncated() -> None:
    endless = ScriptedSampler({"*": call('{"a": 1, "b": 1}')})
    ((episode,),) = run_episodes(endless, [ASK], tools=[ADD], limits=LIMITS, most_turns=3)
    assert len(episode.turns) == 3
    assert episode.stop == "turns"
    assert episode.completion.truncated


def test_a_defect_of_a_tool_is_not_hidden() -> None:
    def broken(arguments: Mapping[str, Any]) -> str:
        raise KeyError("defect")

    with pytest.raises(KeyError, match="defect"):
        run_episodes(scripted(call("{}")), [ASK], tools=[Tool("add", "", {}, broken)], limits=LIMITS)


def test_python_runs_in_the_sandbox() -> None:
    try:
        ((episode,),) = run_episodes(
            scripted(call('{"code": "print(2 + 3)"}', "python"), "5"), [ASK], tools=[python_tool()], limits=LIMITS
        )
    except IsolationUnavailable as error:
        pytest.skip(f"THE SANDBOX IS NOT TESTED HERE: {error}")
    assert episode.messages[3].content == "5"


def sampled(tokens: list[int], completion: Completion) -> Completion:
    logprobs = tuple(-0.001 * (index + 1) for index in range(len(tokens)))
    return replace(completion, tokens=tuple(tokens), logprobs=logprobs)


def test_only_sampled_tokens_are_trained(tokenizer: Tokenizer) -> None:
    ((episode,),) = run_episodes(scripted(call('{"a": 2, "b": 3}'), "It is 5."), [ASK], tools=[ADD], limits=LIMITS)
    turns = tuple(
        (place, sampled([*tokenizer.encode(completion.text), tokenizer.end_of_turn], completion))
        for place, completion in episode.turns
    )
    episode = replace(episode, turns=turns)
    (sequence,) = training_sequences(tokenizer, episode)
    rows = list(zip(*sequence, strict=True))
    assert [token for token, trained, _ in rows if trained] == [t for _, c in turns for t in c.tokens]
    assert [logprob for _, trained, logprob in rows if trained] == [p for _, c in turns for p in c.logprobs]
    context = tokenizer.decode(token for token, trained, _ in rows if not trained)
    assert "tool\n5<|im_end|>" in context  # the result is read and not trained
    assert "It is 5." not in context
    # each turn follows what the sampler was prompted with
    first = sequence.trained.index(True)
    assert sequence.tokens[:first] == render(tokenizer, episode.messages[:2])


def test_a_turn_sampled_in_other_tokens_than_its_text_reads_in_begins_a_sequence(tokenizer: Tokenizer) -> None:
    ((episode,),) = run_episodes(scripted(call('{"a": 2, "b": 3}'), "It is 5."), [ASK], tools=[ADD], limits=LIMITS)
    (place, one), (later, other) = episode.turns
    letters = [token for letter in one.text for token in tokenizer.encode(letter)]
    assert letters != tokenizer.encode(one.text)
    turns = (
        (place, sampled([*letters, tokenizer.end_of_turn], one)),
        (later, sampled([*tokenizer.encode(other.text), tokenizer.end_of_turn], other)),
    )
    first, second = training_sequences(tokenizer, replace(episode, turns=turns))
    assert (
        tuple(token for token, trained in zip(first.tokens, first.trained, strict=True) if trained)
        == turns[0][1].tokens
    )
    assert sum(second.trained) == len(turns[1][1].tokens)
    assert second.tokens[: -sum(second.trained)] == render(tokenizer, episode.messages[:later])
