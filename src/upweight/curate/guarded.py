"""The texts that no document may hold: the problems of an evaluation, from files of any common form.

.jsonl (also compressed)    a Problem or a conversation (its messages), or the first of FIELDS that a record has
.parquet                    the first of FIELDS among the columns
anything else               plain text, each paragraph a text
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as arrow
import pyarrow.parquet as parquet

from upweight.core.errors import UserError
from upweight.core.files import DAMAGE, matching, opened, raw
from upweight.core.identity import fingerprint
from upweight.core.records import Message, Problem
from upweight.curate.decoding import decode

FIELDS = ("question", "problem", "prompt", "instruction", "input", "query", "text")
FEWEST_WORDS = 8
"""Shorter paragraphs of plain text are no test."""
_LINES = re.compile(r"\.jsonl?(\.\w+)?$")


def guarded(patterns: Iterable[str]) -> list[Problem]:
    """The texts of some files, as problems without an answer. UserError where a file holds none, or cannot be read."""
    found: dict[str, Problem] = {}
    for path in (path for pattern in patterns for path in matching(pattern)):
        texts = 0
        try:
            for name, text in _texts(path):
                texts += 1
                found.setdefault(fingerprint(text), Problem(name, (Message("user", text),), None, (), path))
        except (arrow.ArrowException, *DAMAGE) as error:
            raise UserError(f"{path} cannot be read to its end ({error}): fetch or write it again") from error
        if not texts:
            raise UserError(
                f"{path} holds no text that a document could be compared with: a file of problems has one of the "
                f"fields {', '.join(FIELDS)} (or messages), a text file paragraphs of {FEWEST_WORDS} words or more"
            )
    return list(found.values())


def _texts(path: str) -> Iterator[tuple[str, str]]:
    """Names and texts."""
    if path.endswith(".parquet"):
        with raw(path) as stored:
            for batch in parquet.ParquetFile(stored).iter_batches(1_000):
                yield from _named(path, batch.to_pylist())
    elif _LINES.search(path):
        with opened(path) as file:
            yield from _named(path, _records(path, file))
    else:
        with opened(path) as file:
            text = decode(file.read())
        if text is None:
            raise UserError(f"{path} is no text: decontamination reads .jsonl, .parquet and plain text")
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text), start=1):
            if len(paragraph.split()) >= FEWEST_WORDS:
                yield f"{path}, paragraph {number}", paragraph


def _records(path: str, file: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number} is no JSON object ({error}): mend or remove it") from None


def _named(path: str, records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for number, record in enumerate(records, start=1):
        text = _text_of(record)
        if text:
            yield str(record.get("id") or f"{path}, record {number}"), text


def _text_of(record: Mapping[str, Any]) -> str:
    messages = record.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        return "\n".join(content for content in contents if isinstance(content, str))
    found = (record[name] for name in FIELDS if isinstance(record.get(name), str) and record[name].strip())
    return next(found, "")
