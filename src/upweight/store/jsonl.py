"""Records as one JSON object a line: how everything that is neither a table, tokens nor weights is stored.

A file appears whole or not at all: it is written beside its name, flushed to the disk and renamed.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from upweight.core.errors import UserError

Record = TypeVar("Record")


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write `records` (dataclasses, or plain JSON data) to `path`, one a line, and return how many there were.

    The records may be a generator: they are written as they come. An earlier file of that name is replaced at the
    end, all at once; if `records` raises, it stays as it was.
    """
    encoder = msgspec.json.Encoder()
    count = 0
    building = path.with_name(f".{path.name}.building")
    try:
        with building.open("wb") as file:
            for record in records:
                file.write(encoder.encode(record) + b"\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
    return count


def iterate_jsonl(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of `path` one after another, never the whole file in memory. Blank lines are passed over.

    Args:
        path: a file of one JSON object a line.
        kind: a dataclass of core/records.py, or `dict` for plain data.

    Raises UserError, naming the file and the line, where a line is no JSON or no such record, and where the file is
    missing.
    """
    decoder = msgspec.json.Decoder(kind)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a file of one {kind.__name__} a line was expected there") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{path}, line {number}: {error}. Each line holds one {kind.__name__} as a JSON object; "
                    f"mend or remove this line, which begins {line[:80].decode('utf-8', 'replace').strip()!r}"
                ) from None
            yield record


def read_jsonl(path: Path, kind: type[Record]) -> list[Record]:
    """All records of `path`; see iterate_jsonl."""
    return list(iterate_jsonl(path, kind))
