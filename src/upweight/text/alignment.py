"""Two tokenizers on one text: where their tokens coincide, and which tokens of both mean the same text.

    student   | The| cat| sat|ting| <end>
    teacher   | The| cat| sitting ...

Tokens coincide where both tokenizers have one over the same span of the text. There both models were asked the same
question, what follows the text so far, and their answers can be compared over the tokens that both vocabularies have.
"""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from upweight.core.errors import UserError
from upweight.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spans(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[tuple[int, int] | None]:
    """The characters of `text` that each token stands for; None for one that begins or ends within a character.

    A token after the end of the text (that which ends the turn) has the empty span there.
    """
    edges: list[int | None] = [0]
    for count in range(1, len(tokens) + 1):
        written = tokenizer.decode(tokens[:count], skip_special=True)
        edges.append(len(written) if text.startswith(written) else None)
    return [
        None if begin is None or end is None or (begin == end and begin < len(text)) else (begin, end)
        for begin, end in itertools.pairwise(edges)
    ]


def coinciding(
    student: Sequence[tuple[int, int] | None], teacher: Sequence[tuple[int, int] | None]
) -> list[tuple[int, int]]:
    """The places (student's, teacher's) of the tokens that stand for the same span, in order."""
    known = {span: place for place, span in enumerate(teacher) if span is not None}
    return [(place, known[span]) for place, span in enumerate(student) if span is not None and span in known]


def shared_tokens(student: Tokenizer, teacher: Tokenizer) -> dict[int, int]:
    """The student's token of each teacher's token that stands for the same bytes, the ends of turns among them."""
    by_bytes: dict[bytes, int] = {}
    for number, told in _contents(student).items():
        by_bytes.setdefault(told, number)
    shared = {number: by_bytes[told] for number, told in _contents(teacher).items() if told in by_bytes}
    shared[teacher.end_of_turn] = student.end_of_turn
    if len(set(shared.values())) < len(shared):  # two of the teacher's tokens for one of the student's: the first one
        first: dict[int, int] = {}
        for number, mine in sorted(shared.items(), key=lambda item: (item[0] != teacher.end_of_turn, item[0])):
            first.setdefault(mine, number)
        shared = {number: mine for mine, number in first.items()}
    return shared


def _contents(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of every token that is no control token."""
    backend: dict[str, Any] = json.loads(tokenizer.to_json())
    decoder = json.dumps(backend.get("decoder"))
    words: dict[str, int] = dict(backend["model"]["vocab"]) if isinstance(backend["model"]["vocab"], dict) else {}
    if not words:
        words = {piece: number for number, (piece, _) in enumerate(backend["model"]["vocab"])}
    control = set(tokenizer.control_tokens.values())
    plain = {token["id"]: token["content"].encode() for token in backend["added_tokens"] if token["id"] not in control}
    if '"ByteLevel"' in decoder:
        known = _byte_letters()
        found = {
            number: bytes(known[letter] for letter in word)
            for word, number in words.items()
            if all(letter in known for letter in word)
        }
    elif "\u2581" in decoder or '"Metaspace"' in decoder or "\\u2581" in decoder:
        found = {number: _of_piece(word) for word, number in words.items()}
    else:
        raise UserError(
            "a tokenizer that is neither byte-level nor of SentencePiece's kind cannot be aligned with another: use a "
            "teacher of the student's tokenizer"
        )
    return {number: told for number, told in {**found, **plain}.items() if number not in control and told}


def _of_piece(word: str) -> bytes:
    byte = _BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: printable ones as themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
