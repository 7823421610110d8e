"""Files as bytes: here or in object storage, compressed or not.

A name with "://" in it ("s3://bucket/corpus/*.jsonl.zst") is opened through fsspec, every other one is a path here. The
ending says how a file is compressed: .gz, .zst, .bz2 or .xz.
"""

import bz2
import dataclasses
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as arrow

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file that is cut off or changed raises."""

OUTSIDE: Mapping[str, bool] = {"outside": True}
"""Metadata of a configuration's field that names files outside the run: `paths: str = field(metadata=OUTSIDE)`."""

_BUFFER_BYTES = 1 << 20


def opened(path: Path | str) -> io.BufferedIOBase:
    """The uncompressed bytes of `path`. Damage shows while reading: one of DAMAGE."""
    name = str(path)
    file: Any = raw(path)
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=file, mode="rb")
    if name.endswith(".zst"):
        packed = arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")
        return io.BufferedReader(packed, _BUFFER_BYTES)
    if name.endswith(".bz2"):
        return bz2.BZ2File(file, "rb")
    if name.endswith(".xz"):
        return lzma.LZMAFile(file, "rb")
    return file  # type: ignore[no-any-return]


def raw(path: Path | str) -> Any:
    """The bytes of `path` as they are stored, as a binary file that can seek."""
    if not is_remote(path):
        return Path(path).open("rb")
    system, inside = _remote(str(path))
    return system.open(inside, "rb")


def matching(pattern: str) -> list[str]:
    """The files that a path or a pattern with * and ** names, in the order of their names; UserError for none."""
    if is_remote(pattern):
        system, inside = _remote(pattern)
        try:
            literal = not has_magic(inside) or system.isfile(inside)
            names = [inside] if literal else system.glob(inside)
            found = sorted(system.unstrip_protocol(name) for name in names if system.isfile(name))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{pattern} cannot be listed ({error}): mend the path of the source, or its access"
            ) from error
    else:
        names = [pattern] if Path(pattern).is_file() else glob(pattern, recursive=True)
        found = sorted(name for name in names if Path(name).is_file())
    if not found:
        raise UserError(f"no file matches {pattern!r} (looked from {Path.cwd()}): mend the path of the source")
    return found


def size_of(path: Path | str) -> int:
    """The stored bytes of a file."""
    if not is_remote(path):
        return Path(path).stat().st_size
    system, inside = _remote(str(path))
    return int(system.size(inside) or 0)


def outside_paths(value: object) -> Iterator[str]:
    """The paths, patterns and directories in the fields of a configuration that are marked as OUTSIDE."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            given = getattr(value, field.name)
            yield from _texts(given) if field.metadata.get("outside") else ()
            yield from outside_paths(given)
    elif isinstance(value, Mapping):
        yield from outside_paths([*value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from outside_paths(item)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def state_of(path: str, root: Path) -> str:
    """What changes when a file is written that `path` names, or one below it: from names, sizes and times. "" where
    nothing is there, and of object storage, where asking takes long.

    Args:
        root: of the artifacts; what lies below it changes all the time, and counts only where `path` leads there.
    """
    if not path or is_remote(path):
        return ""
    named = [Path(path)] if Path(path).exists() else map(Path, glob(path, recursive=True))
    files = {file for one in named for file in ([one] if one.is_file() else _below(one, root)) if file.is_file()}
    found = [(str(file), file.stat()) for file in sorted(files)]
    return fingerprint([[name, state.st_size, state.st_mtime_ns] for name, state in found]) if found else ""


def _below(directory: Path, root: Path) -> Iterator[Path]:
    own = root.resolve() if root.resolve().is_relative_to(directory.resolve()) else None
    for file in directory.rglob("*"):
        if own is None or not file.resolve().is_relative_to(own):
            yield file


def is_remote(path: Path | str) -> bool:
    """Whether a name is one in object storage, or anything else that fsspec opens."""
    return "://" in str(path)


def _remote(url: str) -> tuple[Any, str]:
    # imported here: takes time, and files here do not need it
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened ({error}): mend the path of the source") from None
    return system, str(inside)
