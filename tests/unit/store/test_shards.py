"""Token shards: what goes in comes out, and damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.store.shards import Shards, ShardWriter

DOCUMENTS = [([1, 2, 3], "web", "a"), ([4], "books", "ö"), ([5, 6, 299], "web", "c")]


def written(directory: Path, vocab_size: int = 300) -> Path:
    writer = ShardWriter(directory, vocab_size=vocab_size)
    for tokens, source, name in DOCUMENTS:
        writer.write(tokens, source=source, document_id=name)
    writer.close()
    return directory


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    shards = Shards.open(written(tmp_path / "s", vocab_size), vocab_size=vocab_size)
    assert (len(shards), shards.tokens, shards.sources) == (3, 7, ("web", "books"))
    for number, (tokens, source, name) in enumerate(DOCUMENTS):
        assert shards.sequence(number).tolist() == tokens
        assert (shards.source(number), shards.document_id(number)) == (source, name)
        assert shards.length(number) == len(tokens)
    assert shards.sequence(2, 1, 2).tolist() == [6]
    assert shards.sequence(0, 1, 99).tolist() == [2, 3]  # never into the next document
    assert shards.tokens_by_source() == {"web": 6, "books": 1}


def test_a_large_token_survives(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", vocab_size=166_144)
    writer.write(np.array([166_143]).tolist(), source="x", document_id="x")
    writer.close()
    assert Shards.open(tmp_path / "s").sequence(0).tolist() == [166_143]


def test_tiers_are_counted_with_their_sources(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", vocab_size=10)
    for source, tier in (("web", "high"), ("web", "medium"), ("books", "high"), ("web", "high")):
        writer.write([1, 2], source=source, document_id="x", tier=tier)
    writer.close()
    shards = Shards.open(tmp_path / "s")
    assert [tuple(shards.group(number)) for number in (0, 1, 3)] == [
        ("web", "high"),
        ("web", "medium"),
        ("web", "high"),
    ]
    assert shards.sources == ("web", "books")
    assert shards.tokens_by_source() == {"web": 6, "books": 2}


def test_more_tokens_than_32_bits_count(tmp_path: Path) -> None:
    # a corpus of 2^32 + 7 tokens whose file is a hole but for the last document: 8.6 GB that take no room on the disk
    last = 2**32
    offsets = np.array([0, 2**31 + 5, last, last + 7], dtype=np.int64)
    directory = written(tmp_path / "s")
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps({**meta, "tokens": last + 7}))
    (directory / "offsets.bin").write_bytes(offsets.tobytes())
    with (directory / "tokens.bin").open("r+b") as file:
        file.truncate(2 * (last + 7))
        file.seek(2 * (last + 4))
        file.write(np.array([7, 8, 9], dtype=np.uint16).tobytes())
    shards = Shards.open(directory)
    assert [shards.length(number) for number in range(3)] == [2**31 + 5, 2**31 - 5, 7]
    assert shards.sequence(2).tolist() == [0, 0, 0, 0, 7, 8, 9]
    assert shards.sequence(1, 2**31 - 7, 2**31 + 9).tolist() == [0, 0]  # up to its own end
    assert shards.tokens_by_source() == {"web": 2**31 + 12, "books": 2**31 - 5}


def test_writing_again_replaces(tmp_path: Path) -> None:
    written(tmp_path / "s")
    writer = ShardWriter(tmp_path / "s", vocab_size=10)
    with pytest.raises(UserError, match="no complete token shards"):
        Shards.open(tmp_path / "s")
    writer.write([1], source="x", document_id="x")
    writer.close()
    assert Shards.open(tmp_path / "s").tokens == 1


@pytest.mark.parametrize(("tokens", "message"), [([], "no token"), ([1, 300], "holds token 300"), ([-1], "token -1")])
def test_bad_tokens_are_refused(tmp_path: Path, tokens: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardWriter(tmp_path / "s", vocab_size=300).write(tokens, source="web", document_id="d")


def test_damage_is_named(tmp_path: Path) -> None:
    directory = written(tmp_path / "s")
    with pytest.raises(UserError, match=r"vocabulary of 300 tokens, the model has 10"):
        Shards.open(directory, vocab_size=10)
    whole = (directory / "tokens.bin").read_bytes()
    (directory / "tokens.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"tokens.bin has 12 bytes instead of 14"):
        Shards.open(directory)
    (directory / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"tokens.bin is missing"):
        Shards.open(directory)
    (directory / "tokens.bin").write_bytes(whole)
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps({**meta, "format": 9}))
    with pytest.raises(UserError, match="format 9"):
        Shards.open(directory)
    (directory / "meta.json").write_text('{"format"')
    with pytest.raises(UserError, match="damaged"):
        Shards.open(directory)


def test_damage_within_a_file_is_named_where_it_is_read(tmp_path: Path) -> None:
    directory = written(tmp_path / "s")
    tokens, offsets, sources = (np.fromfile(directory / name, dtype) for name, dtype in _FILES)
    np.where(tokens == 6, 40_000, tokens).astype(np.uint16).tofile(directory / "tokens.bin")
    shards = Shards.open(directory)
    assert shards.sequence(0).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"tokens.bin holds token 40000 in document 2, but its vocabulary has 300"):
        shards.sequence(2)
    offsets[1] = 5
    offsets.tofile(directory / "offsets.bin")
    with pytest.raises(UserError, match=r"offsets.bin puts document 1 at tokens 5 to 4 of 7"):
        Shards.open(directory).length(1)
    sources[0] = 9
    sources.tofile(directory / "sources.bin")
    with pytest.raises(UserError, match=r"gives document 0 the group 9 of 2"):
        Shards.open(directory).source(0)
    # another dtype shows in the size: uint32 where the vocabulary takes uint16
    tokens.astype(np.uint32).tofile(directory / "tokens.bin")
    with pytest.raises(UserError, match=r"tokens.bin has 28 bytes instead of 14"):
        Shards.open(directory)
    (directory / "offsets.bin").unlink()
    tokens.tofile(directory / "tokens.bin")
    with pytest.raises(UserError, match=r"offsets.bin is missing"):
        Shards.open(directory)


_FILES = (("tokens.bin", np.uint16), ("offsets.bin", np.int64), ("sources.bin", np.uint16))
