"""Answers token by token, for several people at once: what chat and serve stand on.

One thread owns the model. It takes a waiting request into a free row of the cache, then decodes one token for all rows
together, and hands each token on as it comes (continuous batching). A request draws from the same stream of random
numbers as rollout/local.py, so the same seed gives the same answer here and there.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits
from upweight.model.language_model import LanguageModel
from upweight.rollout.local import draw
from upweight.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
Stop = Literal["end", "length", "stop", "error"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer.

    Attributes:
        token: its id; the end-of-turn token comes too, with no text.
        logprob: in nats, under the distribution it was drawn from.
        text: what became readable with it; empty within a character of several tokens or a possible stop string.
        stop: why the answer ends with this piece; None where it goes on.
        error: what went wrong, with stop "error".
    """

    token: int
    logprob: float
    text: str
    stop: Stop | None = None
    error: str = ""


BROKEN_OFF = Piece(0, 0.0, "", "error", "the model stopped answering")


class Request:
    """One answer in the making. `cancel` may be called from any thread; the row is free at the next token."""

    def __init__(self, prompt: Sequence[int], limits: Limits, deliver: Callable[[Piece], None], seconds: float) -> None:
        self.prompt = list(prompt)
        self.limits = limits
        self.deliver = deliver
        self.cancelled = threading.Event()
        self.deadline = time.monotonic() + seconds
        self.made = 0
        self.last = 0
        key = np.array([seed_for(limits.seed, self.prompt, 0), 0], dtype=np.uint64)  # the sampler's first of a prompt
        stream = np.random.Generator(np.random.Philox(key=key))
        self.uniforms = torch.from_numpy(stream.random(limits.max_new_tokens, dtype=np.float32))
        self._pending: list[int] = []
        self._held = ""

    def cancel(self) -> None:
        """Nobody reads the answer any more."""
        self.cancelled.set()

    def take(self, token: int, logprob: float, tokenizer: Tokenizer) -> bool:
        """Hand the next token on; False where the answer ends with it."""
        self.last = token
        self.made += 1
        if token in (tokenizer.end_of_turn, tokenizer.end_of_text):
            self.deliver(Piece(token, logprob, self._rest(tokenizer), "end"))
            return False
        self._pending.append(token)
        text = tokenizer.decode(self._pending)
        if text.endswith(UNFINISHED) and len(self._pending) < 4:  # a character of UTF-8 has at most four bytes
            text = ""
        else:
            self._pending.clear()
        text, stopped = self._up_to_stop(text)
        over = self.made >= self.limits.max_new_tokens or time.monotonic() > self.deadline
        if stopped:
            self.deliver(Piece(token, logprob, text, "stop"))
        elif over:
            self.deliver(Piece(token, logprob, text + self._rest(tokenizer), "length"))
        else:
            self.deliver(Piece(token, logprob, text))
        return not (stopped or over)

    def _up_to_stop(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string ends it. A tail that may become a stop string is held back."""
        text = self._held + text
        found = [text.find(stop) for stop in self.limits.stop if stop in text]
        if found:
            self._held = ""
            return text[: min(found)], True
        tails = [size for stop in self.limits.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        shown = len(text) - max(tails, default=0)
        self._held = text[shown:]
        return text[:shown], False

    def _rest(self, tokenizer: Tokenizer) -> str:
        rest = self._held + (tokenizer.decode(self._pending) if self._pending else "")
        self._held = ""
        self._pending.clear()
        return rest


class Engine:
    """Decodes for up to `rows` requests at once in a thread of its own; more wait their turn.

    Args:
        capacity: tokens of prompt and answer together; 0 takes the model's context. Memory is taken for all rows.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, rows: int = 1, capacity: int = 0) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        context = model.config.max_context
        self.capacity = min(capacity, context) if capacity else context
        self._device = model.device
        self._cache: Any = model.new_cache(rows=rows, capacity=self.capacity)
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._active: list[Request] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], limits: Limits, deliver: Callable[[Piece], None], *, seconds: float = 3600.0
    ) -> Request:
        """Begin an answer; `deliver` is called from the engine's thread with each piece.

        Raises UserError where prompt and answer do not fit, or the prompt is empty.
        """
        if self._closed:
            raise UserError("the model has stopped answering: start it again")
        if not prompt:
            raise UserError("the prompt is empty: send at least one token")
        if len(prompt) + limits.max_new_tokens > self.capacity:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and may grow by {limits.max_new_tokens}, but the context is "
                f"{self.capacity}: lower the tokens to generate, or shorten the conversation"
            )
        request = Request(prompt, limits, deliver, seconds)
        self._waiting.put(request)
        return request

    def stream(self, prompt: Sequence[int], limits: Limits) -> Iterator[Piece]:
        """The pieces of one answer, in this thread. Leaving the loop early cancels the rest."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        request = self.submit(prompt, limits, pieces.put)
        try:
            while True:
                piece = pieces.get()
                yield piece
                if piece.stop is not None:
                    return
        finally:
            request.cancel()

    def close(self) -> None:
        """End the thread; answers in the making are broken off."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closed:
                    self._admit()
                    self._drop_cancelled()
                    if self._active:
                        self._step()
        finally:  # whatever ends this thread, nobody is left waiting for it
            self._closed = True
            left = list(self._active)
            while not self._waiting.empty():
                left += filter(None, [self._waiting.get()])
            for request in left:
                request.deliver(BROKEN_OFF)

    def _admit(self) -> None:
        """Read waiting prompts into free rows; with nothing to do, wait for one."""
        while len(self._active) < self._cache.rows:
            try:
                request = self._waiting.get(block=not self._active)
            except queue.Empty:
                return
            if request is None:
                return
            if self._closed:
                request.deliver(BROKEN_OFF)
                continue
            if request.cancelled.is_set():
                continue
            row = len(self._active)
            self._cache.clear([row])
            tokens = torch.tensor([request.prompt], device=self._device)
            hidden = self.model(tokens, cache=self._cache, rows=[row], counts=[len(request.prompt)])
            self._active.append(request)
            if not self._draw(row, self.model.logits(hidden[:, -1])):
                self._remove(row)

    def _step(self) -> None:
        last = torch.tensor([[request.last] for request in self._active], device=self._device)
        logits = self.model.logits(self.model(last, cache=self._cache)[:, 0])
        going_on = [self._draw(row, logits[row : row + 1]) for row in range(len(self._active))]
        for row in reversed([row for row, more in enumerate(going_on) if not more]):
            self._remove(row)

    def _draw(self, row: int, logits: torch.Tensor) -> bool:
        request = self._active[row]
        uniform = request.uniforms[request.made : request.made + 1].to(self._device)
        token, logprob = draw(logits, uniform, request.limits)
        return request.take(int(token), float(logprob), self.tokenizer)

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._active))):
            if self._active[row].cancelled.is_set():
                self._remove(row)

    def _remove(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        final = len(self._active) - 1
        if row != final:
            self._cache.copy(final, [row])
            self._active[row] = self._active[final]
        self._active.pop()
