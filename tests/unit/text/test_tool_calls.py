"""Calls are told and read back, by templates that know tools and by those that do not."""

from upweight.core.records import Message, ToolCall
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer
from upweight.text.tool_calls import parse_reply, render_with_tools

SCHEMA = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"


def test_calls_are_taken_out_of_the_answer_alone() -> None:
    text = (
        '<think><tool_call>{"name": "no", "arguments": {}}</tool_call></think>Let me see.\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>'
    )
    reply = parse_reply(text, prefix="c")
    assert reply.calls == (ToolCall("c_0", "add", '{"a": 1}'), ToolCall("c_1", "add", '{"a": 2}'))
    assert reply.text.endswith("</think>Let me see.")


def test_what_is_no_call_stays() -> None:
    for text in (
        "no call",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
        "<tool_call>[]</tool_call>",
    ):
        reply = parse_reply(text)
        assert reply.text == text
        assert reply.calls == ()


def test_both_kinds_of_templates_are_told_everything() -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "1 + 2?"),
        Message("assistant", "", tool_calls=(ToolCall("c", "add", '{"a": 1, "b": 2}'),)),
        Message("tool", "three", tool_call_id="c"),
    ]
    for template in (CHATML, PLAIN):
        tokenizer = Tokenizer.train(["Be brief. 1 + 2? add three"], 300, chat_template=template)
        told = tokenizer.decode(render_with_tools(tokenizer, messages, [SCHEMA]))
        for part in ("Be brief.", '"name": "add"', "1 + 2?", '{"name": "add", "arguments": {"a": 1, "b": 2}}', "three"):
            assert part in told, (template, part)
        assert told.count("Be brief.") == 1
        without = tokenizer.decode(render_with_tools(tokenizer, messages[:2], []))
        assert "tool" not in without
