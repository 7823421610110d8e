"""Functions that a model may call: how they are told to it, and how its calls are read from what it writes.

A call is written in the reply's text, as the chat templates of models trained here, of Qwen and of Hermes have it:

    <tool_call>
    {"name": "python", "arguments": {"code": "print(2 + 2)"}}
    </tool_call>

Templates that know tools render the functions, the calls of earlier turns and their results. For one that does not, all
of it is said in plain messages, so that any chat model can be asked.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from upweight.core.records import Message, ToolCall
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_KNOWS = re.compile(r"\btools\b")


class Reply(NamedTuple):
    """What a model wrote: its text without the calls, and the calls."""

    text: str
    calls: tuple[ToolCall, ...]


def instructions(schemas: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says about the functions, each described as in OpenAI's interface."""
    listed = "\n".join(json.dumps(schema) for schema in schemas)
    form = '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    return f"You may call these functions:\n<tools>\n{listed}\n</tools>\nTo call one, write\n{form}"


def parse_reply(text: str, *, prefix: str = "call") -> Reply:
    """The calls in `text` after its thought, and the text without them. What is no JSON object stays in the text.

    Args:
        prefix: what the ids of the calls begin with; they are numbered.
    """
    thought, closed, said = text.rpartition("</think>")
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        call = _call(found.group(1), f"{prefix}_{len(calls)}")
        if call is None:
            return found.group()
        calls.append(call)
        return ""

    rest = _CALL.sub(take, said)
    return Reply(f"{thought}{closed}{rest.strip() if calls else rest}", tuple(calls))


def _call(text: str, name: str) -> ToolCall | None:
    try:
        asked = json.loads(text)
        function, arguments = asked["name"], asked.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, function, written) if isinstance(function, str) else None


def render_with_tools(
    tokenizer: Tokenizer, messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The prompt for the next assistant's turn, with the functions that it may call; without any, as `render`."""
    if _KNOWS.search(tokenizer.chat_template or ""):
        return render(tokenizer, messages, tools=list(schemas) or None)
    plain = [_in_words(message) for message in messages]
    if schemas:
        given = plain[0].content + "\n\n" if plain and plain[0].role == "system" else ""
        plain = [message for place, message in enumerate(plain) if place or message.role != "system"]
        plain.insert(0, Message("system", given + instructions(schemas)))
    return render(tokenizer, plain)


def _in_words(message: Message) -> Message:
    """Calls and results as the text of plain messages."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    written = [
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
        for call in message.tool_calls
    ]
    return replace(message, content="\n".join(filter(None, [message.content, *written])), tool_calls=())
