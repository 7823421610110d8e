"""Talking to a checkpoint in the terminal: the answer appears as it is made, the thinking dimmed; two side by side."""

import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from upweight.app.engine import Engine, Piece, open_engine
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.core.work import Machine
from upweight.model.precision import Precision
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
LEAVE, ANEW = ("/quit", "/exit"), "/new"
PROMPT_END_TOKENS = 16
CUT_OFF = Text(" [cut off: the limit of new tokens is reached]", style="yellow")


@dataclass
class Talker:
    """One model and its side of the conversation."""

    name: str
    engine: Engine
    messages: list[Message]


def chat(
    given: Sequence[str],
    *,
    root: Path,
    limits: Limits,
    machine: Machine,
    dtype: Precision | None = None,
    system: str | None = None,
    thinking: bool = True,
    each_line: bool = False,
    console: Console | None = None,
) -> None:
    """Answer what is typed, until its end; or what comes from a pipe, as one message.

    Args:
        given: one model, or two that answer side by side; see app/lineage.find_model.
        thinking: show what stands between the thinking marks, dimmed.
        each_line: each line of a pipe is a question of its own.
    """
    console = console or Console(highlight=False)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    opening = [Message("system", system)] if system else []
    talkers: list[Talker] = []
    try:
        for name in given:
            engine = open_engine(name, root=root, device=machine.device, dtype=dtype)
            talkers.append(Talker(name, engine, list(opening)))
        if sys.stdin.isatty():
            for talker in talkers:
                size = talker.engine.model.config.parameter_count()
                console.print(f"{talker.name}: {size:,} parameters. /new starts over, /quit leaves.", style="dim")
        for line, anew in _messages(console, each_line):
            if anew:
                for talker in talkers:
                    talker.messages = list(opening)
            if line:
                try:
                    _exchange(talkers, line, len(opening), limits, console, thinking)
                except UserError as error:  # whoever types can say it in fewer words
                    if not sys.stdin.isatty() or any(talker.engine.closed for talker in talkers):
                        raise
                    console.print(Text(str(error), style="yellow"))
    finally:
        for talker in talkers:
            talker.engine.close()


def _messages(console: Console, each_line: bool) -> Iterator[tuple[str, bool]]:
    """What to answer, and whether a conversation begins with it."""
    if not sys.stdin.isatty():
        try:
            read = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"what comes from the pipe is not UTF-8 (byte {error.start}): convert it") from None
        yield from ((text.strip(), True) for text in (read.split("\n") if each_line else [read]))
        return
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if line in LEAVE:
            return
        yield ("", True) if line == ANEW else (line, False)


def fitted(tokenizer: Tokenizer, messages: list[Message], opening: int, capacity: int) -> list[Message]:
    """`messages` without as many of the oldest turns as leave no room for an answer; the opening stays.

    Raises UserError where the last message alone is too long.
    """
    while len(render(tokenizer, messages)) >= capacity:
        if len(messages) <= opening + 1:
            raise UserError(f"this message is longer than the model's context of {capacity} tokens: shorten it")
        del messages[opening : opening + 2]
    return messages


def _exchange(
    talkers: Sequence[Talker], line: str, opening: int, limits: Limits, console: Console, thinking: bool
) -> None:
    """Ask all of them, show the answers as they come, and keep them in the conversations."""
    asked = [
        fitted(talker.engine.tokenizer, [*talker.messages, Message("user", line)], opening, talker.engine.capacity)
        for talker in talkers
    ]
    for talker, messages in zip(talkers, asked, strict=True):
        talker.messages = messages
    if len(talkers) == 1:
        answers = [_answer(talkers[0], limits, console, thinking)]
    else:
        answers = _side_by_side(talkers, limits, console, thinking)
    for talker, answer in zip(talkers, answers, strict=True):
        talker.messages.append(Message("assistant", answer))


def _pieces(talker: Talker, limits: Limits) -> Iterator[Piece]:
    prompt = render(talker.engine.tokenizer, talker.messages)
    room = min(limits.max_new_tokens, talker.engine.capacity - len(prompt))
    yield from talker.engine.stream(prompt, replace(limits, max_new_tokens=room))


def _refuse_broken(piece: Piece) -> None:
    """Raises UserError where the answer does not go on: half of one must not be taken for the whole."""
    if piece.stop == "error":
        raise UserError(f"{piece.error}: what is above says why")


def _shown(talker: Talker, thinking: bool) -> "Shown":
    """For an answer of this model, whose template may have begun the thinking in the prompt."""
    tokenizer = talker.engine.tokenizer
    end = tokenizer.decode(render(tokenizer, talker.messages)[-PROMPT_END_TOKENS:])
    return Shown(thinking, inside=end.rstrip().endswith(THINK))


def _answer(talker: Talker, limits: Limits, console: Console, thinking: bool) -> str:
    """Print the answer as it comes and return it whole."""
    shown = _shown(talker, thinking)
    whole, stop = "", None
    for piece in _pieces(talker, limits):
        whole += piece.text
        stop = piece.stop
        _refuse_broken(piece)
        for text, dimmed in shown.parts(piece.text, last=stop is not None):
            console.print(Text(text, style="dim" if dimmed else ""), end="", soft_wrap=True)
    console.print(CUT_OFF if stop == "length" else "")
    return whole


def _side_by_side(talkers: Sequence[Talker], limits: Limits, console: Console, thinking: bool) -> list[str]:
    """Both answers in two columns, growing as they come."""
    arrived: queue.SimpleQueue[tuple[int, Piece | None]] = queue.SimpleQueue()

    def follow(place: int) -> None:
        try:
            for piece in _pieces(talkers[place], limits):
                arrived.put((place, piece))
        finally:
            arrived.put((place, None))

    shown = [_shown(talker, thinking) for talker in talkers]
    columns = [Text() for _ in talkers]
    answers = [""] * len(talkers)
    threads = [threading.Thread(target=follow, args=(place,), daemon=True) for place in range(len(talkers))]
    for thread in threads:
        thread.start()
    left = len(talkers)
    live = console.is_terminal
    with Live(console=console, refresh_per_second=8, transient=live, auto_refresh=live) as screen:
        while left:
            place, piece = arrived.get()
            if piece is None:
                left -= 1
                continue
            _refuse_broken(piece)
            answers[place] += piece.text
            for text, dimmed in shown[place].parts(piece.text, last=piece.stop is not None):
                columns[place].append(text, style="dim" if dimmed else "")
            if piece.stop == "length":
                columns[place].append_text(CUT_OFF)
            if live:
                screen.update(_columns(talkers, columns))
    console.print(_columns(talkers, columns))
    return answers


def _columns(talkers: Sequence[Talker], texts: Sequence[Text]) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in talkers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(talker.name, style="bold") for talker in talkers))
    table.add_row(*texts)
    return table


class Shown:
    """Splits a stream of text into thinking and answer; the marks themselves are not shown.

    Args:
        inside: the stream begins within the thinking.
    """

    def __init__(self, thinking: bool, *, inside: bool = False) -> None:
        self.thinking = thinking
        self._inside = inside
        self._held = ""  # what may become a mark: models whose tokenizer has none write it in several pieces

    def parts(self, text: str, *, last: bool = False) -> Iterator[tuple[str, bool]]:
        """The visible parts of the next piece, the `last` one or not, and whether each is to be dimmed."""
        text, self._held = self._held + text, ""
        while text:
            mark = END_THINK if self._inside else THINK
            before, found, text = text.partition(mark)
            if not found and not last:
                begun = next((size for size in range(len(mark) - 1, 0, -1) if before.endswith(mark[:size])), 0)
                before, self._held = before[: len(before) - begun], before[len(before) - begun :]
            if before and (self.thinking or not self._inside):
                yield before, self._inside
            if found:
                self._inside = not self._inside
