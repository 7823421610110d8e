"""Conversations of others: every form that is read, and what is refused with its place."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.records import Conversation, Message, ToolCall
from upweight.store.jsonl import write_jsonl
from upweight.text.conversations import ConversationDataset, ConversationFiles, evenly, parse

QUESTION = {"role": "user", "content": "12 + 30?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOLD: list[dict[str, Any]] = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "c1"},
    {"role": "assistant", "content": "42", "reasoning_content": "the tool says so"},
]
READ = Conversation(
    (
        Message("user", "12 + 30?"),
        Message("assistant", "", (ToolCall("c1", "add", '{"a": 12, "b": 30}'),)),
        Message("tool", "42", tool_call_id="c1"),
        Message("assistant", "<think>\nthe tool says so\n</think>\n\n42"),
    ),
    "tools",
    (ADD,),
)


def read(row: dict[str, Any]) -> Conversation:
    return parse(row, column="messages", source="", default="tools", where="here")


def test_tool_calls_thinking_and_tools() -> None:
    assert read({"messages": TOLD, "tools": [ADD]}) == READ
    assert read({"messages": TOLD, "tools": json.dumps([ADD])}) == READ
    flat = [*TOLD[:1], {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}]
    assert read({"messages": flat}).messages[1].tool_calls == (ToolCall("0", "add", '{"a": 1}'),)


def test_other_spellings() -> None:
    shared = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    assert [(m.role, m.content) for m in read({"messages": shared}).messages] == [
        ("system", "Be brief."),
        ("user", "x"),
        ("assistant", "y"),
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert read({"messages": parts}).messages[0].content == "ab"


@pytest.mark.parametrize(("mark", "trained"), [({}, True), ({"weight": 0}, False), ({"trained": False}, False)])
def test_a_flawed_turn_is_marked(mark: dict[str, Any], trained: bool) -> None:
    turn = {"role": "assistant", "content": "41", **mark}
    assert [m.trained for m in read({"messages": [QUESTION, turn]}).messages] == [True, trained]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"here has no field 'messages', it has text: set column"),
        ({"messages": "hello"}, "not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "here, message 0 is 'hello', not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 0 is of the role 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "message 1: its tool call 0"),
        ({"messages": [QUESTION | {"weight": 0.5}]}, "in the loss"),
        ({"messages": [QUESTION], "tools": "["}, "tools are no JSON"),
        ({"messages": [QUESTION], "tools": ["add"]}, "not a list of function"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(row)


def test_files(tmp_path: Path) -> None:
    row = {"messages": TOLD, "tools": [ADD]}
    line = json.dumps(row) + "\n"
    (tmp_path / "a.jsonl").write_text(line + "\n" + line)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    with arrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(line.encode())
    flat = [{**QUESTION}, {"role": "assistant", "content": "42"}]
    parquet.write_table(arrow.table({"messages": [flat, flat], "source": ["x", None]}), tmp_path / "d.parquet")
    write_jsonl(tmp_path / "e.jsonl", [READ])  # our own records
    found = list(ConversationFiles(f"{tmp_path}/*").conversations())
    assert [conversation.source for conversation in found] == ["a", "a", "b", "c", "x", "d", "tools"]
    assert [conversation.messages for conversation in found[:4]] == [READ.messages] * 4
    assert found[5].messages[1] == Message("assistant", "42")
    assert found[6] == READ
    some = list(ConversationFiles(f"{tmp_path}/*", source="mine", most=3).conversations())
    assert [conversation.source for conversation in some] == ["mine"] * 3


def test_evenly_by_hand() -> None:
    # of 7 places 3: floor(3 (n + 1) / 7) rises at n = 2, 4 and 6
    assert list(evenly(range(7), 7, 3)) == [2, 4, 6]
    assert list(evenly(range(3), 3, 5)) == [0, 1, 2]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="matches no file"):
        list(ConversationFiles(f"{tmp_path}/*.jsonl").conversations())
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TOLD}) + "\n[1]\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is no JSON object"):
        list(ConversationFiles(f"{tmp_path}/a.jsonl").conversations())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(ConversationFiles(f"{tmp_path}/b.jsonl.gz").conversations())
    parquet.write_table(arrow.table({"text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no column 'messages', it has text"):
        list(ConversationFiles(f"{tmp_path}/c.parquet").conversations())
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(ConversationFiles(f"{tmp_path}/c.parquet").conversations())


def test_a_dataset_without_the_library_is_an_error_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'upweight\[datasets\]'"):
        list(ConversationDataset("owner/chats").conversations())


def test_a_dataset_is_read_through_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"messages": TOLD, "tools": [ADD], "source": None}] * 4
    asked: list[object] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        return rows

    def missing(name: str, *_: object, **__: object) -> None:
        raise FileNotFoundError(f"{name} is not on the hub")

    errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    library = SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda _: {"test": rows[:1]}, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = list(ConversationDataset("owner/tools", split="test", subset="en", most=2).conversations())
    assert asked == [("owner/tools", "en", "test")]
    assert found == [READ, READ]
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert len(list(ConversationDataset(str(tmp_path), split="test").conversations())) == 1
    library.load_dataset = missing
    with pytest.raises(
        UserError, match=r"owner/chats \(subset None, split train\) cannot be opened: owner/chats is not"
    ):
        list(ConversationDataset("owner/chats").conversations())
