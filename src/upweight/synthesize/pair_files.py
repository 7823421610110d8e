"""Preference pairs of one's own, from a JSONL file.

A line is a Pair of core/records.py, or one of the forms that people and TRL write:

    {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"}
    {"prompt": [{"role": "user", "content": ...}], "chosen": [{"role": "assistant", "content": ...}], "rejected": [...]}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [the same question, another answer]}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.records import Completion, Message, Pair, Problem
from upweight.store.jsonl import iterate_jsonl
from upweight.text.conversations import parse

GIVEN = "given"
"""The policy of a response that stands in a file: nobody knows who wrote it."""


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """The pairs of `path`, in its order.

    Raises UserError, naming the line, where one is no pair, where a response is empty and where both are the same.
    """
    found = 0
    for found, row in enumerate(iterate_jsonl(Path(path), dict), start=1):
        yield _pair(row, f"{path}, pair {found}")
    if not found:
        raise UserError(f'{path} holds no pair: write one {{"prompt": ..., "chosen": ..., "rejected": ...}} a line')


def _pair(row: dict[str, Any], where: str) -> Pair:
    if "problem" in row:
        try:
            pair = msgspec.convert(row, Pair)
        except msgspec.ValidationError as error:
            raise UserError(f"{where}: {error}") from None
    else:
        pair = _short(row, where)
    for name, member in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not member.text.strip() and not member.tokens:
            raise UserError(f"{where}: its {name} response is empty: drop the pair, or give the response")
    if pair.chosen.text == pair.rejected.text and pair.chosen.tokens == pair.rejected.tokens:
        raise UserError(f"{where}: both responses are the same, so neither is better: drop the pair")
    return pair


def _short(row: Mapping[str, Any], where: str) -> Pair:
    missing = [name for name in ("chosen", "rejected") if not isinstance(row.get(name), (str, list))]
    if missing:
        raise UserError(
            f"{where} has no {' and no '.join(missing)}: a pair is a prompt, the chosen response and the rejected one, "
            f"each a text or a list of messages; it has {', '.join(map(str, row)) or 'nothing'}"
        )
    asked = row.get("prompt", row.get("question"))
    if asked is None:
        chosen, rejected = _turns(row["chosen"], "chosen", where), _turns(row["rejected"], "rejected", where)
        if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
            raise UserError(
                f"{where} has no prompt, and what comes before the last turn of chosen and of rejected differs or is "
                "missing: two answers to different questions cannot be compared"
            )
        messages, members = chosen[:-1], (chosen[-1].content, rejected[-1].content)
    else:
        messages = (Message("user", asked),) if isinstance(asked, str) else _turns(asked, "prompt", where)
        members = (_response(row["chosen"], "chosen", where), _response(row["rejected"], "rejected", where))
    problem = Problem(str(row.get("id", fingerprint([one.content for one in messages]))), messages)
    chosen_one, rejected_one = (Completion((), (), text, "end", GIVEN) for text in members)
    return Pair(problem, chosen_one, rejected_one)


def _response(given: object, name: str, where: str) -> str:
    if isinstance(given, str):
        return given
    turns = _turns(given, name, where)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise UserError(f"{where}: {name} beside a prompt is one assistant's turn, it has {len(turns)} messages")
    return turns[0].content


def _turns(given: object, name: str, where: str) -> tuple[Message, ...]:
    talk = parse({"messages": given}, column="messages", source=name, default=name, where=f"{where}, {name}")
    return talk.messages
