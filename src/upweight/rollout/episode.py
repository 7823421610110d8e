"""Episodes: a model writes, calls a tool, reads what it returned, and goes on until it answers without a call.

A call is written in the reply's text, as the chat template of models trained here describes it:

    <tool_call>
    {"name": "python", "arguments": {"code": "print(2 + 2)"}}
    </tool_call>

Reinforcement needs the very tokens that were sampled, with the log-probabilities they were sampled at.
`training_sequences` lays an episode out so: sampled tokens are trained, and everything else (prompt, tool output, the
template's own tokens) is context. Where the rendering of a later turn does not begin with the tokens of the earlier
ones, because the template drops thoughts or the text would be cut into other tokens, a new sequence begins.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler
from upweight.core.records import Completion, Message
from upweight.rollout.sandbox import Sandbox, SandboxLimits, shared_sandbox
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer
from upweight.text.tool_calls import instructions

LONGEST_RESULT = 4000
"""Characters of a tool's result that the model is shown; the middle of a longer one is left out."""

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MARKS = ("<tool_call>", "</tool_call>")
_IN_EVERY_CALL = (*_MARKS, "{", '"name"', "}")


class ToolError(Exception):
    """What a tool raises to tell the model that its call was wrong. Any other exception ends the run."""


@dataclass(frozen=True)
class Tool:
    """Something a model may call.

    Attributes:
        parameters: the JSON schema of the arguments, shown to the model.
        run: from the arguments to the text that the model reads.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], str]

    def schema(self) -> dict[str, Any]:
        """As OpenAI's interface and chat templates describe functions."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def python_tool(sandbox: Sandbox | None = None, limits: SandboxLimits | None = None) -> Tool:
    """A Python interpreter in the sandbox, fresh for each call; what the program prints is the result."""

    def run(arguments: Mapping[str, Any]) -> str:
        code = arguments.get("code")
        if not isinstance(code, str):
            raise ToolError('python needs one argument, "code", a string')
        done = (sandbox or shared_sandbox()).run(code, limits=limits)
        late = "the program ran out of time\n" if done.timed_out else ""
        return (late + done.stdout + done.stderr).strip() or "(nothing was printed)"

    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    return Tool("python", "Runs a Python program and returns what it prints.", schema, run)


@dataclass(frozen=True, slots=True)
class Episode:
    """One run of a conversation with tools.

    Attributes:
        messages: all of it, the prompt first.
        turns: what the model wrote, in order, and where in `messages` each stands.
        stop: how the last turn stopped, or "turns" where the model still called tools when its turns, or its room, were
            used up.
    """

    messages: tuple[Message, ...]
    turns: tuple[tuple[int, Completion], ...]
    stop: str

    @property
    def completion(self) -> Completion:
        """The last turn, which holds the answer; "length" where there is none, so that a verifier gives nothing."""
        last = self.turns[-1][1]
        return replace(last, stop="length") if self.stop == "turns" else last


def run_episodes(
    sampler: Sampler,
    prompts: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Tool],
    limits: Limits,
    count: int = 1,
    most_turns: int = 4,
    fits: Callable[[Sequence[Message]], bool] = lambda messages: True,
) -> list[list[Episode]]:
    """`count` episodes for each prompt, all of them advanced together turn by turn.

    The tools are described in the system message. A call of an unknown tool, with arguments that are no JSON object, or
    refused by the tool, is answered with the reason. `limits` hold for each turn.

    Args:
        fits: whether a conversation leaves room for another turn. An episode that does not ends as one whose turns are
            used up: what a tool returned must not end a whole run.

    Raises UserError for a stop string that cuts calls short.
    """
    if most_turns < 1:
        raise ValueError(f"most_turns is {most_turns}: an episode has at least one turn")
    cutting = [
        stop
        for stop in limits.stop
        if any(stop in part for part in _IN_EVERY_CALL) or any(mark in stop for mark in _MARKS)
    ]
    if tools and cutting:
        raise UserError(
            f"the stop string {cutting[0]!r} cuts tool calls short, which are then not made: leave it out, "
            "since a reply ends after its calls by itself"
        )
    by_name = {tool.name: tool for tool in tools}
    starts = [_with_instructions(prompt, tools) for prompt in prompts]
    first = sampler.sample(starts, count=count, limits=limits)
    episodes = [
        _advance(start, (), completion, by_name)
        for start, group in zip(starts, first, strict=True)
        for completion in group
    ]
    for _ in range(most_turns - 1):
        going = [index for index, one in enumerate(episodes) if one.stop == "turns" and fits(one.messages)]
        if not going:
            break
        replies = sampler.sample([episodes[index].messages for index in going], count=1, limits=limits)
        for index, (reply,) in zip(going, replies, strict=True):
            episodes[index] = _advance(episodes[index].messages, episodes[index].turns, reply, by_name)
    return (
        [episodes[start : start + count] for start in range(0, len(episodes), count)]
        if count
        else [[] for _ in prompts]
    )


def _with_instructions(prompt: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    if not tools:
        return tuple(prompt)
    told = instructions([tool.schema() for tool in tools])
    if prompt and prompt[0].role == "system":
        return (Message("system", f"{prompt[0].content}\n\n{told}"), *prompt[1:])
    return (Message("system", told), *prompt)


def _advance(
    messages: tuple[Message, ...],
    turns: tuple[tuple[int, Completion], ...],
    reply: Completion,
    tools: Mapping[str, Tool],
) -> Episode:
    """The episode after one more reply and the results of its calls; its stop is "turns" while it goes on."""
    turns = (*turns, (len(messages), reply))
    messages = (*messages, Message("assistant", reply.text))
    calls = [] if reply.truncated else _CALL.findall(_called_in(reply.text))
    if not calls:
        return Episode(messages, turns, reply.stop)
    results = [Message("tool", _shortened(_answer(call, tools)), trained=False) for call in calls]
    return Episode((*messages, *results), turns, "turns")


def _called_in(text: str) -> str:
    """What stands after the thought: a call that is only thought about is not made, nor one in a thought without end.

    Nor is any beside several thoughts, or beside one that does not begin the reply: chat templates do not write such a
    reply back as it was, so that the episode could not go on from what the model said.
    """
    before, _, after = text.rpartition("</think>")
    thought = before.lstrip().removeprefix("<think>")
    odd = "<think>" in after or "<think>" in thought or "</think>" in thought
    return "" if odd else after


def _answer(call: str, tools: Mapping[str, Tool]) -> str:
    try:
        asked = json.loads(call)
        name, arguments = asked["name"], asked.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'error: a call is a JSON object {"name": ..., "arguments": {...}}'
    if not isinstance(name, str) or name not in tools:
        return f"error: there is no function {name!r}, only {', '.join(tools)}"
    if not isinstance(arguments, dict):
        return "error: the arguments of a call are a JSON object"
    try:
        return tools[name].run(arguments)
    except ToolError as error:
        return f"error: {error}"


def _shortened(text: str) -> str:
    half = LONGEST_RESULT // 2
    return text if len(text) <= LONGEST_RESULT else f"{text[:half]}\n...\n{text[-half:]}"


class EpisodeSequence(NamedTuple):
    """Tokens, whether each was sampled and is trained, and the log-probability of those, 0 elsewhere."""

    tokens: list[int]
    trained: list[bool]
    logprobs: list[float]


def training_sequences(tokenizer: Tokenizer, episode: Episode) -> list[EpisodeSequence]:
    """The fewest sequences in which each turn's sampled tokens follow exactly what the sampler was prompted with."""
    sequences: list[EpisodeSequence] = []
    for place, completion in episode.turns:
        prompt = render(tokenizer, episode.messages[:place])
        held = sequences[-1] if sequences else EpisodeSequence([], [], [])
        if not sequences or prompt[: len(held.tokens)] != held.tokens:
            held = EpisodeSequence([], [], [])
            sequences.append(held)
        context = prompt[len(held.tokens) :]
        sampled = list(completion.tokens)
        held.tokens.extend(context + sampled)
        held.trained.extend([False] * len(context) + [True] * len(sampled))
        held.logprobs.extend([0.0] * len(context) + list(completion.logprobs or [0.0] * len(sampled)))
    return sequences
