"""Conversations of others as our records: JSON lines, parquet, and Hugging Face datasets with a `messages` column.

A message is `{"role": ..., "content": ...}` as everywhere, or `{"from": ..., "value": ...}` as in ShareGPT. Read
beside it:

    tool_calls, tool_call_id   calls as OpenAI writes them, their arguments a JSON text or an object
    reasoning_content          the thinking of an assistant's turn, set before its content between <think> and </think>
    trained: false, weight: 0  a flawed turn: it stays in the context and out of the loss
    tools                      beside `messages`: the functions that may be called, a list or its JSON text

A row that is anything else is refused with its place: a conversation read wrongly would be trained on unnoticed.
"""

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import msgspec
import pyarrow as arrow
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.files import DAMAGE, OUTSIDE, opened
from upweight.core.hub import open_dataset
from upweight.core.records import Conversation, Message, Role, ToolCall

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
} | {role: role for role in get_args(Role)}
SHOWN = 80

Item = TypeVar("Item")


@dataclass(frozen=True)
class ConversationFiles:
    """Files of conversations, one a line or row: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.

    Attributes:
        paths: a path or a pattern with * and **.
        source: what the conversations count as; "" takes the row's own `source`, or else the file's name.
        column: the field of the messages.
        most: at most so many are taken, evenly from all; 0 takes all.
    """

    paths: str = field(metadata=OUTSIDE)
    source: str = ""
    column: str = "messages"
    most: int = 0

    def conversations(self) -> Iterator[Conversation]:
        """The conversations in the order of the paths. Raises UserError, naming file and line, for one that is none."""
        named = [self.paths] if Path(self.paths).is_file() else glob.glob(self.paths, recursive=True)
        found = sorted(Path(path) for path in named if Path(path).is_file())
        if not found:
            raise UserError(f"{self.paths} matches no file (looked from {Path.cwd()}): mend the paths")
        rows: Iterator[tuple[Path, str, Mapping[str, Any]]] = (row for path in found for row in self._rows(path))
        if self.most:
            total = sum(1 for path in found for _ in self._rows(path))
            rows = evenly(rows, total, self.most)
        for path, where, row in rows:
            default = path.name.partition(".")[0]
            yield parse(row, column=self.column, source=self.source, default=default, where=where)

    def _rows(self, path: Path) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
        rows = _parquet_rows(path, self.column) if path.suffix == ".parquet" else _json_rows(path)
        return ((path, where, row) for where, row in rows)


@dataclass(frozen=True)
class ConversationDataset:
    """A data set for the `datasets` library (an extra: pip install 'upweight[datasets]'): a hub name or a directory.

    Attributes:
        name: "owner/name" on the hub, a directory that `save_to_disk` wrote, or one of files.
        split, subset: as `load_dataset` takes them.
        source: what the conversations count as; "" takes the row's own `source`, or else the name.
        column: the column of the messages.
        most: at most so many are taken, evenly from all; 0 takes all.
    """

    name: str = field(metadata=OUTSIDE)
    split: str = "train"
    subset: str | None = None
    source: str = ""
    column: str = "messages"
    most: int = 0

    def conversations(self) -> Iterator[Conversation]:
        """The conversations in the data set's order."""
        default = self.name.rstrip("/").rpartition("/")[2]
        rows = self._rows()
        numbered: Iterable[tuple[int, Mapping[str, Any]]] = enumerate(rows, start=1)
        for number, row in evenly(numbered, len(rows), self.most) if self.most else numbered:
            where = f"{self.name} ({self.split}), row {number}"
            yield parse(row, column=self.column, source=self.source, default=default, where=where)

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        rows = open_dataset(self.name, split=self.split, subset=self.subset)
        return cast(Sequence[Mapping[str, Any]], rows)


def evenly(items: Iterable[Item], total: int, most: int) -> Iterator[Item]:
    """`most` of `total` items at equal distances, in order; all of them where there are no more."""
    for place, item in enumerate(items):
        if total <= most or (place + 1) * most // total > place * most // total:
            yield item


def parse(row: Mapping[str, Any], *, column: str, source: str, default: str, where: str) -> Conversation:
    """The conversation of one row. Raises UserError, beginning with `where`, where it is none.

    Args:
        source, default: what it counts as; without `source` the row's own field of that name, else `default`.
    """
    if column not in row:
        raise UserError(f"{where} has no field {column!r}, it has {', '.join(map(str, row)) or 'none'}: set column")
    messages = row[column]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: {column} is {_shown(messages)}, not a list of messages")
    turns = tuple(_message(message, f"{where}, message {index}") for index, message in enumerate(messages))
    named = source or row.get("source") or default
    return Conversation(turns, str(named), _tools(row.get("tools"), where))


def _message(fields: object, where: str) -> Message:
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} is {_shown(fields)}, not an object with role and content")
    said = str(fields.get("role", fields.get("from")))
    role = ROLES.get(said)
    if role is None:
        raise UserError(f"{where} is of the role {said!r}: known are {', '.join(sorted(ROLES))}")
    content = _content(fields.get("content", fields.get("value")), where)
    thinking = fields.get("reasoning_content")
    if thinking and role == "assistant":
        content = f"<think>\n{str(thinking).strip()}\n</think>\n\n{content}"
    calls = tuple(_call(call, index, where) for index, call in enumerate(fields.get("tool_calls") or ()))
    answered = fields.get("tool_call_id")
    return Message(
        cast(Role, role), content, calls, None if answered is None else str(answered), _is_trained(fields, where)
    )


def _content(content: object, where: str) -> str:
    """Text as it is; a list of parts joined; null, as beside tool calls, empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(cast(list[str], texts))
    raise UserError(f"{where}: its content is {_shown(content)}; only text can be trained on")


def _call(call: object, index: int, where: str) -> ToolCall:
    inner = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise UserError(f"{where}: its tool call {index} is {_shown(call)}; expected a function with a name")
    arguments = inner.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    identifier = call.get("id") if isinstance(call, Mapping) else None
    return ToolCall(str(identifier or index), inner["name"], text)


def _is_trained(fields: Mapping[str, Any], where: str) -> bool:
    for name in ("trained", "weight"):
        value = fields.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise UserError(f"{where}: its {name} is {_shown(value)}; a turn is in the loss (1) or out of it (0)")
        return bool(value)
    return True


def _tools(tools: object, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(f"{where}: its tools are no JSON ({error})") from None
    if not tools:
        return ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: its tools are {_shown(tools)}, not a list of function descriptions")
    return tuple(dict(tool) for tool in tools)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    try:
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield f"{path}, line {number}", decoder.decode(line)
                    except (msgspec.DecodeError, UnicodeDecodeError) as error:
                        begins = line[:SHOWN].decode("utf-8", "replace").strip()
                        raise UserError(
                            f"{path}, line {number} is no JSON object ({error}): mend or remove it; it begins "
                            f"{begins!r}"
                        ) from None
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read to its end ({error}): fetch or write it again") from error


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    row = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(f"{path} has no column {column!r}, it has {', '.join(names)}: set column")
        for batch in file.iter_batches(1_000, columns=[n for n in (column, "tools", "source") if n in names]):
            for fields in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", fields
    except (OSError, arrow.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read to its end ({error}): fetch or write it again") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
