"""Files as bytes, whether they are compressed or not: by their ending, .gz or .zst."""

import gzip
import io
from pathlib import Path

import pyarrow as arrow


def opened(path: Path) -> io.BufferedIOBase:
    """The uncompressed bytes of `path`. Damage shows while reading: OSError, EOFError or zlib.error."""
    if path.suffix == ".gz":
        return gzip.GzipFile(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(arrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")
