"""Answers token by token, for several people at once: what chat and serve stand on.

One thread owns the model. It takes a waiting request into a free row of the cache, then decodes one token for all rows
together, and hands each token on as it comes (continuous batching). A request draws from the same stream of random
numbers as rollout/local.py, so the same seed gives the same answer here and there.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits
from upweight.model.cache import cache_room
from upweight.model.language_model import LanguageModel, load
from upweight.model.logprobs import truncate
from upweight.model.memory import keep_freed_memory
from upweight.model.precision import DTYPES, Precision, usual_precision
from upweight.rollout.local import draw
from upweight.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so tokens, at most."""
Stop = Literal["end", "length", "stop", "error"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer.

    Attributes:
        token: its id; the end-of-turn token comes too, with no text.
        logprob: in nats, under the distribution it was drawn from; of a greedy choice under the model's own.
        text: what became readable with it; empty within a character of several tokens or a possible stop string.
        stop: why the answer ends with this piece; None where it goes on.
        error: what went wrong, with stop "error".
        alternatives: the likeliest tokens at this place and their log-probabilities, where the request asked for some.
    """

    token: int
    logprob: float
    text: str
    stop: Stop | None = None
    error: str = ""
    alternatives: tuple[tuple[int, float], ...] = ()


BROKEN_OFF = Piece(0, 0.0, "", "error", "the model stopped answering")


class Request:
    """One answer in the making. `cancel` may be called from any thread; the row is free at the next token."""

    def __init__(
        self,
        prompt: Sequence[int],
        limits: Limits,
        deliver: Callable[[Piece], None],
        seconds: float,
        alternatives: int = 0,
    ) -> None:
        self.prompt = list(prompt)
        self.alternatives = alternatives
        self.limits = limits
        self.deliver = deliver
        self.cancelled = threading.Event()
        self.deadline = time.monotonic() + seconds
        self.made = 0
        self.last = 0
        key = np.array([seed_for(limits.seed, self.prompt, 0), 0], dtype=np.uint64)  # the sampler's first of a prompt
        stream = np.random.Generator(np.random.Philox(key=key))
        self.uniforms = torch.from_numpy(stream.random(limits.max_new_tokens, dtype=np.float32))
        self._told: list[int] = []  # tokens that end with a whole character
        self._pending: list[int] = []  # those since then, of whose text so many characters are readable
        self._readable = 0
        self._silent = 0  # tokens in a row that made nothing readable
        self._held = ""

    def cancel(self) -> None:
        """Nobody reads the answer any more."""
        self.cancelled.set()

    def take(self, drawn: "Drawn", tokenizer: Tokenizer) -> bool:
        """Hand the next token on; False where the answer ends with it."""
        token, logprob, others = drawn
        self.last = token
        self.made += 1
        if token in (tokenizer.end_of_turn, tokenizer.end_of_text):
            self.deliver(Piece(token, logprob, self._rest(tokenizer), "end", alternatives=others))
            return False
        self._pending.append(token)
        text, stopped = self._up_to_stop(self._whole_characters(tokenizer))
        over = self.made >= self.limits.max_new_tokens or time.monotonic() > self.deadline
        if stopped:
            self.deliver(Piece(token, logprob, text, "stop", alternatives=others))
        elif over:
            self.deliver(Piece(token, logprob, text + self._rest(tokenizer), "length", alternatives=others))
        else:
            self.deliver(Piece(token, logprob, text, alternatives=others))
        return not (stopped or over)

    def _whole_characters(self, tokenizer: Tokenizer) -> str:
        """What became readable with the last token. One that ends a character may begin the next one."""
        text = tokenizer.decode_after(self._told, self._pending)
        whole = text.rstrip(UNFINISHED)
        if len(whole) <= self._readable < len(text):
            self._silent += 1
            if self._silent == LONGEST_CHARACTER:  # so many tokens would have ended one: but the last may begin another
                whole, self._silent = text[:-1], 1
        else:
            self._silent = 0
        readable = whole[self._readable :]
        self._readable += len(readable)
        if whole == text:
            self._told, self._pending, self._readable = self._pending, [], 0
        return readable

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
        pending = tokenizer.decode_after(self._told, self._pending) if self._pending else ""
        rest = self._held + pending[self._readable :]
        self._held, self._readable = "", 0
        self._pending.clear()
        return rest


def _distribution(logits: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The log-probabilities that tokens are drawn with; of a greedy choice, those of the model itself."""
    if limits.temperature == 0:
        return logits.float().log_softmax(dim=-1)
    scaled = logits.float() / limits.temperature
    return truncate(scaled, top_p=limits.top_p, top_k=limits.top_k, min_p=limits.min_p).log_softmax(dim=-1)


class Drawn(NamedTuple):
    """The next token of a row."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


def open_engine(
    given: str, *, root: Path, device: str = "cpu", rows: int = 1, dtype: Precision | None = None
) -> "Engine":
    """An engine around the model that a person names, see app/lineage.find_model, held in `dtype` or what is usual."""
    directory = find_model(given, root)
    model, _ = load(directory, device=device, dtype=DTYPES[dtype or usual_precision(device)])
    return Engine(model, Tokenizer.load(directory), rows=rows)


class Engine:
    """Decodes for up to `rows` requests at once in a thread of its own; more wait their turn.

    Args:
        rows: at most; fewer where the memory for keys and values does not suffice.
        capacity: tokens of prompt and answer together; 0 takes the model's context.
        cache_bytes: memory for keys and values, which is taken for all rows at the start. 0 takes 4 GiB, on CUDA half
            of what is free.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        rows: int = 1,
        capacity: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        context = model.config.max_context
        self.capacity = min(capacity, context) if capacity else context
        self._device = model.device
        room = cache_bytes or cache_room(self._device)
        self.rows = max(1, min(rows, room // max(1, model.cache_bytes(self.capacity))))
        if self._device.type == "cpu":
            keep_freed_memory()
        self._cache: Any = model.new_cache(rows=self.rows, capacity=self.capacity)
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._active: list[Request] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether nothing is answered any more: it was closed, or its thread has failed."""
        return self._closed

    def submit(
        self,
        prompt: Sequence[int],
        limits: Limits,
        deliver: Callable[[Piece], None],
        *,
        seconds: float = 3600.0,
        alternatives: int = 0,
    ) -> Request:
        """Begin an answer; `deliver` is called from the engine's thread with each piece.

        Args:
            seconds: the longest that it may take from now; it is then cut off.
            alternatives: how many of the likeliest tokens are told at each place.

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
        request = Request(prompt, limits, deliver, seconds, alternatives)
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
            (drawn,) = self._draw([row], self.model.logits(hidden[:, -1]))
            if not request.take(drawn, self.tokenizer):
                self._remove(row)

    def _step(self) -> None:
        last = torch.tensor([[request.last] for request in self._active], device=self._device)
        logits = self.model.logits(self.model(last, cache=self._cache)[:, 0])
        drawn = self._draw(range(len(self._active)), logits)
        going_on = [request.take(one, self.tokenizer) for request, one in zip(self._active, drawn, strict=True)]
        for row in reversed([row for row, more in enumerate(going_on) if not more]):
            self._remove(row)

    def _draw(self, rows: Sequence[int], logits: torch.Tensor) -> list[Drawn]:
        """The next token of each row; rows that are decoded alike are drawn together."""
        alike: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            limits = self._active[row].limits
            alike.setdefault((limits.temperature, limits.top_p, limits.top_k, limits.min_p), []).append(place)
        found: dict[int, Drawn] = {}
        for places in alike.values():
            requests = [self._active[rows[place]] for place in places]
            scores, limits = logits[places], requests[0].limits
            uniforms = torch.stack([request.uniforms[request.made] for request in requests]).to(self._device)
            tokens, logprobs = draw(scores, uniforms, limits)
            most = max(request.alternatives for request in requests)
            if most or limits.temperature == 0:
                told = _distribution(scores, limits)
                logprobs = told.gather(1, tokens[:, None])[:, 0]
                values, others = told.topk(max(most, 1), dim=-1)
                listed = [list(zip(*pair, strict=True)) for pair in zip(others.tolist(), values.tolist(), strict=True)]
            else:
                listed = [[] for _ in places]
            each = zip(places, requests, tokens.tolist(), logprobs.tolist(), listed, strict=True)
            for place, request, token, logprob, likely in each:
                kept = [(other, value) for other, value in likely[: request.alternatives] if value > -math.inf]
                found[place] = Drawn(token, logprob, tuple(kept))
        return [found[place] for place in range(len(rows))]

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._active))):
            if self._active[row].cancelled.is_set():
                self._remove(row)

    def _remove(self, row: int) -> None:
        """Free a row; the last one moves into its place."""
        final = len(self._active) - 1
        if row != final:
            self._cache.copy([final], [row])
            self._active[row] = self._active[final]
        self._active.pop()
