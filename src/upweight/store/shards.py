"""Tokenized documents on disk, memory-mapped: any document of a corpus of any size is one seek away.

meta.json        format, vocabulary, counts, names of the sources; written last, so a directory with it is complete
tokens.bin       all documents one after another, uint16 where the vocabulary fits and uint32 where not
offsets.bin      int64, documents + 1: where each document begins
sources.bin      uint16: which group each document is of, a source and its tier; meta.json lists the groups
trained.bin      uint8, one a token: whether it is to be predicted; empty where every token is
ids.bin, id_offsets.bin   the documents' ids, UTF-8, and where each begins
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from upweight.core.errors import UserError

FORMAT = 2
META = "meta.json"
SMALL_VOCABULARY = 1 << 16
MOST_GROUPS = 1 << 16
FLUSH_BYTES = 1 << 22


class Group(NamedTuple):
    """What documents are counted by: where they come from, and the tier that curation gave them."""

    source: str
    tier: str = ""


class ShardWriter:
    """Writes documents one after another. What an earlier writer left in the directory is overwritten.

    Args:
        vocab_size: token ids lie below it.
        marked: whether each document comes with what is trained of it.
    """

    def __init__(self, directory: Path, *, vocab_size: int, marked: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / META).unlink(missing_ok=True)
        self.directory = directory
        self.vocab_size, self.marked = vocab_size, marked
        self._dtype = np.dtype(np.uint16 if vocab_size <= SMALL_VOCABULARY else np.uint32)
        self._files = {name: (directory / name).open("wb") for name in _ARRAYS}
        self._files["offsets.bin"].write(np.int64(0).tobytes())
        self._files["id_offsets.bin"].write(np.int64(0).tobytes())
        self._groups: dict[Group, int] = {}
        self._pending: dict[str, bytearray] = {name: bytearray() for name in _ARRAYS}
        self.documents = self.tokens = self._id_bytes = 0

    def write(
        self,
        tokens: Sequence[int],
        *,
        source: str,
        document_id: str,
        tier: str = "",
        trained: Sequence[bool] | None = None,
    ) -> None:
        """Append one document. Raises UserError where it has no token, or one outside the vocabulary."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size == 0:
            raise UserError(f"document {document_id} ({source}) has no token: leave it out")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(
                f"document {document_id} ({source}) holds token {int(ids.max() if ids.min() >= 0 else ids.min())}, but "
                f"the vocabulary has {self.vocab_size}: encode it with the tokenizer that the shards are for"
            )
        if (trained is not None) != self.marked or (trained is not None and len(trained) != ids.size):
            raise ValueError(f"document {document_id}: marks of what is trained go with marked shards, one a token")
        number = self._groups.setdefault(Group(source, tier), len(self._groups))
        if number >= MOST_GROUPS:
            raise UserError(f"more than {MOST_GROUPS} sources in {self.directory}: name sources more coarsely")
        name = document_id.encode()
        self.documents += 1
        self.tokens += ids.size
        self._id_bytes += len(name)
        self._put("tokens.bin", ids.astype(self._dtype).tobytes())
        self._put("offsets.bin", np.int64(self.tokens).tobytes())
        self._put("sources.bin", np.uint16(number).tobytes())
        self._put("trained.bin", np.asarray(trained or (), dtype=np.uint8).tobytes())
        self._put("ids.bin", name)
        self._put("id_offsets.bin", np.int64(self._id_bytes).tobytes())

    def _put(self, name: str, data: bytes) -> None:
        pending = self._pending[name]
        pending += data
        if len(pending) >= FLUSH_BYTES:
            self._files[name].write(pending)
            pending.clear()

    def close(self) -> None:
        """Flush everything to the disk; the shards exist from here on."""
        for name, file in self._files.items():
            file.write(self._pending[name])
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "documents": self.documents,
            "tokens": self.tokens,
            "id_bytes": self._id_bytes,
            "marked": self.marked,
            "groups": list(self._groups),
        }
        hidden = self.directory / f".{META}.writing"
        with hidden.open("w") as text:
            text.write(json.dumps(meta, indent=1))
            text.flush()
            os.fsync(text.fileno())
        hidden.replace(self.directory / META)


class Shards:
    """Documents as token sequences, read from disk where they are asked for.

    What is read is checked as it is read: a token outside the vocabulary, or offsets that do not rise, are a UserError
    that names the file and the document, not a wrong batch.

    Attributes:
        tokens: of all documents together.
        groups: sources and tiers, in the order in which they were first written.
        vocab_size: token ids lie below it.
    """

    def __init__(self, directory: Path, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.directory = directory
        self.vocab_size: int = meta["vocab_size"]
        self.tokens: int = meta["tokens"]
        self.groups: tuple[Group, ...] = tuple(Group(*group) for group in meta["groups"])
        self._count: int = meta["documents"]
        self._arrays = arrays

    @classmethod
    def open(cls, directory: Path, *, vocab_size: int | None = None) -> "Shards":
        """The shards in `directory`.

        Args:
            vocab_size: of the model that is to read them. Raises UserError where they were written for another.

        Raises UserError where they are missing, incomplete, truncated or of an unknown format.
        """
        path = directory / META
        if not path.exists():
            raise UserError(f"{directory} holds no complete token shards ({META} is missing): run the shard step again")
        try:
            meta = json.loads(path.read_text())
            form = meta["format"]
            expected = _sizes(meta) if form == FORMAT else {}
            if form == FORMAT and not all(len(group) == len(Group._fields) for group in meta["groups"]):
                raise ValueError("groups are pairs of a source and a tier")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): run the shard step again") from None
        if form != FORMAT:
            raise UserError(f"{path} is of format {form}, this version reads {FORMAT}: run the shard step again")
        if vocab_size is not None and meta["vocab_size"] != vocab_size:
            raise UserError(
                f"{directory} was written for a vocabulary of {meta['vocab_size']} tokens, the model has {vocab_size}: "
                "use the tokenizer that belongs to the model and run the shard step again"
            )
        arrays: dict[str, Any] = {}
        for name, (dtype, count) in expected.items():
            file = directory / name
            size = file.stat().st_size if file.exists() else -1
            if size != count * dtype.itemsize:
                found = "is missing" if size < 0 else f"has {size:,} bytes instead of {count * dtype.itemsize:,}"
                raise UserError(f"{file} {found}: the shards are damaged, run the shard step again")
            arrays[name] = np.memmap(file, dtype=dtype, mode="r") if count else np.empty(0, dtype)
        shards = cls(directory, meta, arrays)
        if shards._count and int(arrays["offsets.bin"][-1]) != shards.tokens:
            raise UserError(f"{directory / 'offsets.bin'} does not end at {shards.tokens:,}: run the shard step again")
        return shards

    def __len__(self) -> int:
        return self._count

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(dict.fromkeys(group.source for group in self.groups))

    def length(self, document: int) -> int:
        """Tokens of one document."""
        first, last = self._span(document)
        return last - first

    def sequence(self, document: int, start: int = 0, end: int | None = None) -> Int64[np.ndarray, " token"]:
        """The tokens of one document, or those from `start` to `end` of it."""
        first, last = self._span(document)
        stop = last if end is None else min(first + end, last)
        tokens = np.asarray(self._arrays["tokens.bin"][first + start : stop], dtype=np.int64)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.directory / 'tokens.bin'} holds token {int(tokens.max())} in document {document}, but its "
                f"vocabulary has {self.vocab_size}: the shards are damaged, run the shard step again"
            )
        return tokens

    def trained(self, document: int) -> Bool[np.ndarray, " token"]:
        """Whether each token of one document is to be predicted; only of marked shards."""
        first, last = self._span(document)
        return np.asarray(self._arrays["trained.bin"][first:last], dtype=bool)

    def lengths(self) -> Int64[np.ndarray, " document"]:
        """Tokens of every document."""
        return np.diff(self._arrays["offsets.bin"])

    def group(self, document: int) -> Group:
        """The source and the tier of one document."""
        number = int(self._arrays["sources.bin"][document])
        if number >= len(self.groups):
            raise UserError(
                f"{self.directory / 'sources.bin'} gives document {document} the group {number} of "
                f"{len(self.groups)}: the shards are damaged, run the shard step again"
            )
        return self.groups[number]

    def source(self, document: int) -> str:
        """Where one document comes from."""
        return self.group(document).source

    def document_id(self, document: int) -> str:
        """The id of one document."""
        offsets = self._arrays["id_offsets.bin"]
        return bytes(self._arrays["ids.bin"][int(offsets[document]) : int(offsets[document + 1])]).decode()

    def tokens_by_source(self) -> dict[str, int]:
        """Tokens of each source."""
        totals = np.bincount(self._arrays["sources.bin"], weights=self.lengths(), minlength=len(self.groups))
        by_source = dict.fromkeys(self.sources, 0)
        for group, total in zip(self.groups, totals, strict=True):
            by_source[group.source] += int(total)
        return by_source

    def _span(self, document: int) -> tuple[int, int]:
        """Where one document begins and ends in tokens.bin."""
        offsets = self._arrays["offsets.bin"]
        first, last = int(offsets[document]), int(offsets[document + 1])
        if not 0 <= first < last <= self.tokens:
            raise UserError(
                f"{self.directory / 'offsets.bin'} puts document {document} at tokens {first:,} to {last:,} of "
                f"{self.tokens:,}: the shards are damaged, run the shard step again"
            )
        return first, last


_ARRAYS = ("tokens.bin", "offsets.bin", "sources.bin", "ids.bin", "id_offsets.bin", "trained.bin")


def _sizes(meta: dict[str, Any]) -> dict[str, tuple[np.dtype[Any], int]]:
    documents = meta["documents"]
    token = np.uint16 if meta["vocab_size"] <= SMALL_VOCABULARY else np.uint32
    marks = meta["tokens"] if meta["marked"] else 0
    counts = (meta["tokens"], documents + 1, documents, meta["id_bytes"], documents + 1, marks)
    kinds = (token, np.int64, np.uint16, np.uint8, np.int64, np.uint8)
    return {name: (np.dtype(kind), int(n)) for name, kind, n in zip(_ARRAYS, kinds, counts, strict=True)}
