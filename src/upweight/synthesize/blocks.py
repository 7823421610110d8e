"""Work in blocks that survive a kill: each one's records are a file, whole or absent, and a whole one is not redone."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from upweight.core.work import Monitor
from upweight.store.jsonl import read_jsonl, write_jsonl

Item = TypeVar("Item")
Record = TypeVar("Record")


def in_blocks(
    folder: Path,
    items: Sequence[Item],
    size: int,
    kind: type[Record],
    work_off: Callable[[Sequence[Item]], Sequence[Record]],
    monitor: Monitor,
    label: str,
) -> Iterator[list[Record]]:
    """The records of one block of items after another; blocks that stand in `folder` are read instead of made.

    Args:
        folder: holds the blocks; remove it with `clear` once the records stand elsewhere.
        size: items of a block, and lost at most in a kill.
        kind: the dataclass of the records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(items), size)
    files = {start: folder / f"{start:08d}.jsonl" for start in starts}
    done = sum(len(items[start : start + size]) for start in starts if files[start].exists())
    with monitor.track(label, total=len(items), unit="problems", done=done) as bar:
        for start in starts:
            block = items[start : start + size]
            if files[start].exists():
                yield read_jsonl(files[start], kind)
                continue
            records = list(work_off(block))
            write_jsonl(files[start], records)
            bar.advance(len(block))
            yield records


def clear(folder: Path) -> None:
    """Remove the blocks: what they held stands in the artifact's own files."""
    shutil.rmtree(folder, ignore_errors=True)
