"""Talking to a checkpoint in the terminal: the answer appears as it is made, the thinking dimmed."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from upweight.app.engine import Engine
from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.core.work import Machine
from upweight.model.language_model import load
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
LEAVE, ANEW = ("/quit", "/exit"), "/new"


def chat(
    given: str,
    *,
    root: Path,
    limits: Limits,
    machine: Machine,
    system: str | None = None,
    thinking: bool = True,
    console: Console | None = None,
) -> None:
    """Answer what is typed, or each line of a pipe, until its end.

    Args:
        given: a model directory, RECIPE or RECIPE:STEP.
        thinking: show what stands between the thinking marks, dimmed.
    """
    console = console or Console(highlight=False)
    directory = find_model(given, root)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    model, config = load(directory, device=machine.device)
    tokenizer = Tokenizer.load(directory)
    engine = Engine(model, tokenizer)
    opening = [Message("system", system)] if system else []
    messages = list(opening)
    if sys.stdin.isatty():
        console.print(
            f"{directory}: {config.parameter_count():,} parameters. /new starts over, /quit leaves.", style="dim"
        )
    try:
        for line in _lines(console):
            if line in LEAVE:
                break
            if line == ANEW:
                messages = list(opening)
            elif line:
                messages = fitted(tokenizer, [*messages, Message("user", line)], len(opening), engine.capacity)
                answer = _answer(engine, messages, limits, console, thinking)
                messages.append(Message("assistant", answer))
    finally:
        engine.close()


def _lines(console: Console) -> Iterator[str]:
    """What is typed, with a prompt on a terminal."""
    while True:
        try:
            yield (console.input("[bold]> [/]") if sys.stdin.isatty() else input()).strip()
        except EOFError:
            return


def fitted(tokenizer: Tokenizer, messages: list[Message], opening: int, capacity: int) -> list[Message]:
    """`messages` without as many of the oldest turns as leave no room for an answer; the opening stays.

    Raises UserError where the last message alone is too long.
    """
    while len(render(tokenizer, messages)) >= capacity:
        if len(messages) <= opening + 1:
            raise UserError(f"this message is longer than the model's context of {capacity} tokens: shorten it")
        del messages[opening : opening + 2]
    return messages


def _answer(engine: Engine, messages: list[Message], limits: Limits, console: Console, thinking: bool) -> str:
    """Print the answer as it comes and return it whole."""
    prompt = render(engine.tokenizer, messages)
    room = min(limits.max_new_tokens, engine.capacity - len(prompt))
    shown = Shown(thinking)
    whole, stop = "", None
    for piece in engine.stream(prompt, replace(limits, max_new_tokens=room)):
        whole += piece.text
        stop = piece.stop
        for text, dimmed in shown.parts(piece.text):
            console.print(Text(text, style="dim" if dimmed else ""), end="", soft_wrap=True)
    console.print(Text(" [cut off: the limit of new tokens is reached]", style="yellow") if stop == "length" else "")
    return whole


class Shown:
    """Splits a stream of text into thinking and answer; the marks themselves are not shown."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._inside = False

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The visible parts of the next piece and whether each is to be dimmed. Each mark is one token, so whole."""
        while text:
            mark = END_THINK if self._inside else THINK
            before, found, text = text.partition(mark)
            if before and (self.thinking or not self._inside):
                yield before, self._inside
            if found:
                self._inside = not self._inside
