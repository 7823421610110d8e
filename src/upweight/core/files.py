"""Files as bytes: here or in object storage, compressed or not.

A name with "://" in it ("s3://bucket/corpus/*.jsonl.zst") is opened through fsspec, every other one is a path here. The
ending says how a file is compressed: .gz, .zst, .bz2 or .xz.
"""

import bz2
import gzip
import io
import lzma
import zlib
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as arrow

from upweight.core.errors import UserError

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file that is cut off or changed raises."""

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
