"""Real text found on any machine: the Python installation that runs this program.

Documentation and docstrings of the standard library and of the installed packages, readmes, licences, source code,
headers, JavaScript, data and generated files: text of very mixed quality, with many true duplicates (every package
brings its licence). What is there depends on what is installed; given the same installation it is the same documents
in the same order. Files are taken in the order of a hash of their paths, so that any share of them is a fair sample.
"""

import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import NamedTuple

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate.source import Reject, read_file

DEFAULT_SHARES: Mapping[str, float] = {
    "documentation": 0.12,
    "python-docstring": 0.24,
    "readme": 0.05,
    "licence": 0.06,
    "javascript": 0.05,
    "data": 0.12,
    "c-code": 0.06,
    "python-code": 0.30,
}
"""Kinds of text, which are also the names of the sources, and their shares of the bytes. A kind of which there is not
enough leaves its room to the last one."""

LICENCE_NAMES = ("licen", "copying", "notice", "copyright")
_KIND_OF_SUFFIX = {
    **dict.fromkeys((".rst", ".md", ".txt", ".html"), "documentation"),
    **dict.fromkeys((".js", ".mjs", ".ts"), "javascript"),
    **dict.fromkeys(
        (".json", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".cfg", ".css", ".svg", ".pem"), "data"
    ),
    **dict.fromkeys((".h", ".hpp", ".c", ".cpp", ".cu", ".cuh", ".pyx", ".pxd"), "c-code"),
    ".py": "python-code",
}
_DOCSTRING = re.compile(
    r'(?:\A(?:\s*\#[^\n]*\n)*|:[ \t]*(?:\#[^\n]*)?\n)[ \t\n]*[rRuU]?"""(?P<text>(?:[^"\\]|\\.|"(?!""))*)"""', re.DOTALL
)


_OURS = re.compile(r"upweight(-.*\.dist-info)?")
"""This program's own directories among the packages: a corpus does not change with the program that builds it."""


class _File(NamedTuple):
    order: str
    origin: str
    path: str


@dataclass(frozen=True)
class PythonInstallation:
    """The text of this Python's standard library and installed packages.

    Attributes:
        max_bytes: how much text to take in all.
        shares: of each kind, 0-1, at most 1 together; see DEFAULT_SHARES for the kinds.
        max_file_bytes: larger files are rejected, unread.
        part_characters: longer texts are cut into parts of at most this length, at the ends of lines where there are.
        parts_of_file: how many parts one file may give, so that no single file fills a kind.
        min_docstring_characters: shorter docstrings are passed over.
    """

    max_bytes: int = 24_000_000
    shares: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    max_file_bytes: int = 8_000_000
    part_characters: int = 6_000
    parts_of_file: int = 12
    min_docstring_characters: int = 200

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.shares if kind not in DEFAULT_SHARES]
        if unknown:
            raise UserError(f"{unknown[0]!r} is no kind of text: expected some of {', '.join(DEFAULT_SHARES)}")
        if not self.shares or any(share < 0 for share in self.shares.values()) or sum(self.shares.values()) > 1 + 1e-9:
            raise UserError(
                f"shares {dict(self.shares)} of PythonInstallation: expected 0-1 each and at most 1 together"
            )
        if min(self.max_bytes, self.part_characters, self.parts_of_file) < 1:
            raise UserError("PythonInstallation: max_bytes, part_characters and parts_of_file are counts of 1 or more")

    def documents(self) -> Iterator[Document | Reject]:
        """The documents kind by kind, each kind up to its share of the bytes."""
        files = _files()
        unused = 0.0
        for place, (kind, share) in enumerate(self.shares.items()):
            last = place == len(self.shares) - 1
            room = share * self.max_bytes + (unused if last else 0.0)
            for record in self._of_kind(kind, files):
                if isinstance(record, Document):
                    size = len(record.text.encode())
                    if size > room:
                        break
                    room -= size
                yield record
            unused += room

    def _of_kind(self, kind: str, files: Mapping[str, list[_File]]) -> Iterator[Document | Reject]:
        if kind == "documentation":
            yield from (part for _, text in sorted(topics.items()) for part in self._parts(text, kind))
        for file in files.get("python-code" if kind == "python-docstring" else kind, ()):
            if not os.path.isfile(file.path):
                continue  # a link that leads nowhere
            record = read_file(file.path, kind, file.origin, most=self.max_file_bytes, strict=True)
            if isinstance(record, Reject):
                # a file that holds no docstring is no malformed record, and the same file counts as code already
                if kind != "python-docstring":
                    yield record
            elif kind == "python-docstring":
                for text in docstrings(record.text, self.min_docstring_characters):
                    yield from self._parts(text, kind)
            else:
                yield from self._parts(_description(record.text) if kind == "readme" else record.text, kind)

    def _parts(self, text: str, kind: str) -> Iterator[Document]:
        """The text, or where it is long its first parts."""
        start = 0
        for _ in range(self.parts_of_file):
            end = start + self.part_characters
            if end < len(text):
                line_end = text.rfind("\n", start + self.part_characters // 2, end)
                end = line_end + 1 if line_end >= 0 else end
            part = text[start:end]
            if part.strip():
                yield Document.of(part, kind)
            if end >= len(text):
                return
            start = end


def docstrings(code: str, fewest_characters: int) -> list[str]:
    """The docstrings of Python code with their indentation taken off, in order.

    Found by their place, first in the file or after a line that ends in a colon: parsing would take 20 times longer.
    """
    found = (inspect.cleandoc(match["text"]) for match in _DOCSTRING.finditer(code))
    return [text for text in found if len(text) >= fewest_characters]


def _description(metadata: str) -> str:
    """What a package says of itself: the body of its METADATA, below the headers."""
    return metadata.partition("\n\n")[2]


def _files() -> dict[str, list[_File]]:
    """The files of the installation by kind, in the order of the hash of their paths below its roots."""
    paths = sysconfig.get_paths()
    roots = {name: os.path.realpath(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    found: dict[str, dict[str, _File]] = {}
    walked: set[str] = set()
    for name, root in roots.items():
        if root in walked:
            continue
        walked.add(root)
        for directory, below, names in os.walk(root):
            # site-packages may lie inside the standard library's directory: it is a root of its own, or not ours
            below[:] = [other for other in below if other not in ("__pycache__", "site-packages", "dist-packages")]
            if directory == root:
                below[:] = [other for other in below if _OURS.fullmatch(other) is None]
            for file in names:  # strings and not paths: an installation has some 50,000 files
                kind = _kind(file, directory)
                if kind is not None:
                    path = os.path.join(directory, file)
                    origin = name + path[len(root) :].replace(os.sep, "/")
                    order = hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()
                    found.setdefault(kind, {})[order] = _File(order, origin, path)
    return {kind: [files[order] for order in sorted(files)] for kind, files in found.items()}


def _kind(name: str, directory: str) -> str | None:
    lowered = name.lower()
    suffix = os.path.splitext(lowered)[1]
    if name == "METADATA":
        return "readme"
    if suffix != ".py" and (lowered.startswith(LICENCE_NAMES) or directory.endswith(f"{os.sep}licenses")):
        return "licence"
    return _KIND_OF_SUFFIX.get(suffix)
