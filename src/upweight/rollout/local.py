"""Sampling from a model in this process: batched decoding with a key/value cache on the trainer's own weights.

A prompt is read once and its cache copied to the rows of its group, also where the group does not fit the batch at
once. Rows whose completions end make room for waiting ones; the last rows move into the gaps, so that every step is
over full rows and costs what they cost.

Each completion has its own stream of uniform numbers, named by the seed, the prompt's tokens and the sample's number,
and a token is drawn by inverting the cumulative distribution. So the same request gives the same completion whatever
else is in the batch, up to the rounding of matrix products of another shape: about 1e-6 in a probability, which matters
only where a uniform number falls into a gap of that size, or a token lies that close to the edge of top-p. Measured in
fp32 on 0.9M parameters: all of 256 completions of 64 tokens are the same with 256 rows and with 37, and
log-probabilities differ from the trainer's by at most 2.5e-5 nats, but for one token in 16,000 on the edge of top-p
(1.5e-3).
"""

import copy
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion
from upweight.model.cache import HOST_BYTES, cache_room
from upweight.model.language_model import LanguageModel, fingerprint, load
from upweight.model.logprobs import truncate
from upweight.model.memory import give_back_freed_memory, keep_freed_memory
from upweight.model.precision import DTYPES, Precision
from upweight.model.transformer import Transformer
from upweight.text.chat import prompt_tokens
from upweight.text.tokenizer import Tokenizer

PREFILL_SCORES = 1 << 24
"""Attention scores of one head that reading prompts may take at once; more prompts are read in several passes."""

SHARE_ROWS = 32
"""Rows that a thread has at least where several decode side by side: with fewer, reading the weights is most of it."""

LARGE_CACHE = 1 << 28
"""Bytes of keys and values from which on free memory goes back to the system around a call: a trainer that samples has
blocks of other sizes, and freed ones of both would add up."""

DRAW_BLOCK = 128
"""Tokens whose probabilities are added up at once to find where a draw falls: a running sum over a whole vocabulary is
several times slower than the sums of its blocks."""

BATCH_ROWS = 256
"""Completions decoded at once unless the caller says otherwise."""

PROMPT_TOKENS = 120
"""Of the longest prompt in a batch, for plans: word problems in a chat template take 60 to 150."""

REFILL_SHARE = 8
"""Waiting completions are admitted once a row in this many is free: reading a prompt alone is a poor matrix product."""


@dataclass(slots=True)
class _Job:
    """One completion to make: which of the samples of which prompt, and its place in the results."""

    prompt: int
    sample: int
    place: int


@dataclass(slots=True)
class _Held:
    """The prompt in the spare row, which more completions wait for, and the logits of the token after it."""

    prompt: int = -1
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class LocalSampler(Sampler):
    """Samples from a model in this process.

    Args:
        model: used as it is at each call; a trainer may change the weights between calls.
        tokenizer: its chat template renders conversations.
        batch_rows: completions decoded at once.
        policy: the fingerprint of the weights, written into each completion.
        cache_bytes: memory for keys and values; where batch_rows long completions need more, fewer run at once. 0 takes
            4 GiB, on CUDA half of what is free at each call.
        dtype: what is computed in; None takes the weights' own. "bfloat16" is faster on processors and GPUs that
            multiply it natively, and several times slower on others. The weights of the moment are rounded at each
            call, and log-probabilities are those of the rounded model, some hundredths of a nat from a trainer's.
        raw_logprobs: also keep each token's log-probability under the model before temperature and truncation.
        fits: a completion that the model's context leaves less room than its limit gets that room, and a prompt that
            leaves none an empty, truncated completion, instead of the whole call being refused.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_rows: int = BATCH_ROWS,
        policy: str = "",
        cache_bytes: int = 0,
        dtype: str | None = None,
        raw_logprobs: bool = False,
        fits: bool = False,
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows is {batch_rows}: at least one completion has to be decoded at a time")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows
        self.policy = policy
        self.cache_bytes = cache_bytes
        self.raw_logprobs = raw_logprobs
        self.dtype = None if dtype is None else DTYPES[dtype]
        self.fits = fits

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """`count` completions for each prompt; UserError where one leaves no room in the model's context."""
        read = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        return self._fitted(read, count, limits) if self.fits else self._sampled(read, count, limits)

    def _fitted(self, read: list[list[int]], count: int, limits: Limits) -> list[list[Completion]]:
        """Each prompt with the room that its own length leaves, those of equal room together."""
        context = self.model.config.max_context
        by_room: dict[int, list[int]] = {}
        for place, tokens in enumerate(read):
            by_room.setdefault(min(limits.max_new_tokens, context - len(tokens)), []).append(place)
        made: dict[int, list[Completion]] = {}
        for room, places in by_room.items():
            if room < 1:
                groups = [[Completion((), (), "", "length", self.policy)] * count for _ in places]
            else:
                groups = self._sampled([read[place] for place in places], count, replace(limits, max_new_tokens=room))
            made.update(zip(places, groups, strict=True))
        return [made[place] for place in range(len(read))]

    def _sampled(self, read: list[list[int]], count: int, limits: Limits) -> list[list[Completion]]:
        longest = max((len(tokens) for tokens in read), default=0)
        context = self.model.config.max_context
        if longest and longest + limits.max_new_tokens > context:
            raise UserError(
                f"the longest prompt has {longest} tokens and may grow by {limits.max_new_tokens}, but the model's "
                f"context is {context}: lower max_new_tokens, shorten the prompt or use a model of a longer context"
            )
        if not read or count < 1:
            return [[] for _ in read]
        if self.model.device.type == "cpu":
            keep_freed_memory()
        total, model, streams = len(read) * count, self._rounded(), _Streams(read, limits)
        held = self.model.cache_bytes(longest + limits.max_new_tokens) * min(self.batch_rows, total)
        large = self.model.device.type == "cpu" and held >= LARGE_CACHE
        if large:
            give_back_freed_memory()
        parts = self._threads(min(self.batch_rows, total))
        cuts = [total * part // parts for part in range(parts + 1)]
        jobs = [[_Job(place // count, place % count, place) for place in range(*cut)] for cut in pairwise(cuts)]
        with torch.inference_mode():
            runs = [_Run(self, model, read, some, limits, streams, parts) for some in jobs]
        made: dict[int, Completion] = {}
        for done in _side_by_side(runs) if parts > 1 else [runs[0].decode()]:
            made |= done
        if large:
            del runs
            give_back_freed_memory()
        return [[made[place] for place in range(start, start + count)] for start in range(0, total, count)]

    def _threads(self, rows: int) -> int:
        """How many threads decode side by side, each a part of the rows. One decoding step is too little work to be
        shared out within its operations; 1 leaves each operation to all threads."""
        if self.model.device.type != "cpu":
            return 1
        return max(1, min(torch.get_num_threads(), rows // SHARE_ROWS))

    def _rounded(self) -> LanguageModel:
        """The model as it is now, in the precision that is sampled in; itself where that is its own."""
        if self.dtype in (None, self.model.unembedding.dtype):
            return self.model
        # rounded on the way: a copy of the weights as they are would be larger than what is kept of it
        weights = {
            id(weight): nn.Parameter(weight.detach().to(self.dtype), False) for weight in self.model.parameters()
        }
        model = copy.deepcopy(self.model, weights).to(self.dtype)
        if isinstance(model, Transformer):
            model.pack(self.batch_rows)
        return model


def open_local(
    directory: Path, *, device: str, dtype: Precision = "float32", batch_rows: int = BATCH_ROWS, fits: bool = False
) -> LocalSampler:
    """A sampler of the checkpoint in `directory`, whose weights are held in `dtype`."""
    model, _ = load(directory, device=device, dtype=DTYPES[dtype])
    tokenizer, policy = Tokenizer.load(directory), fingerprint(model)
    if isinstance(model, Transformer):
        model.pack(batch_rows)
    return LocalSampler(model.eval(), tokenizer, batch_rows=batch_rows, policy=policy, fits=fits)


def planned_bytes(
    held_bytes: float | int, completions: float | int, limits: Limits, *, batch_rows: int = BATCH_ROWS
) -> float:
    """For a plan: the memory of the cache in which so many completions are decoded, of a model that holds `held_bytes`
    of a token. One row more than are decoded keeps a prompt."""
    rows = min(completions, batch_rows) + 1
    return float(min(HOST_BYTES, rows * (PROMPT_TOKENS + limits.max_new_tokens) * held_bytes))


def _side_by_side(runs: "Sequence[_Run]") -> "list[dict[int, Completion]]":
    """What the runs make, each in a thread of its own: torch lets go of the interpreter while it computes."""
    threads = torch.get_num_threads()

    def alone(run: "_Run") -> dict[int, Completion]:
        torch.set_num_threads(max(1, threads // len(runs)))  # of this thread
        return run.decode()

    with ThreadPoolExecutor(len(runs)) as pool:
        try:
            return list(pool.map(alone, runs))
        finally:
            for run in runs:
                run.stopped = True  # where one failed, or the user wants no more, the others need not go on
            torch.set_num_threads(threads)  # also of threads that are yet to come


class _Run:
    """A call, or a thread's part of one: rows 0, 1, ... of the cache are being decoded, row r making `jobs[r]`.

    The cache has one row more than are decoded: it keeps a prompt whose group waits for room.

    Args:
        waiting: the completions to make.
        parts: how many runs share the rows and the memory that the sampler may take.
    """

    def __init__(
        self,
        sampler: LocalSampler,
        model: LanguageModel,
        prompts: list[list[int]],
        waiting: Sequence[_Job],
        limits: Limits,
        streams: "_Streams",
        parts: int,
    ) -> None:
        self.prompts, self.limits, self.policy = prompts, limits, sampler.policy
        self.model, self.tokenizer = model, sampler.tokenizer
        self.device = self.model.device
        capacity = max(len(prompts[job.prompt]) for job in waiting) + limits.max_new_tokens
        memory = (sampler.cache_bytes or cache_room(self.device)) // parts
        room = memory // self.model.cache_bytes(capacity) - 1  # and one that holds a prompt
        self.rows = max(1, min(len(waiting), sampler.batch_rows // parts, room))
        self.waiting = deque(waiting)
        self.streams = streams
        self.stopped = False
        self.completions: dict[int, Completion] = {}
        self.cache: Any = self.model.new_cache(rows=self.rows + 1, capacity=capacity)
        self.held = _Held()
        self.jobs: list[_Job] = []
        shape = (self.rows, limits.max_new_tokens)
        self.uniforms = torch.zeros(shape, device=self.device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.raw = torch.zeros(shape if sampler.raw_logprobs else (self.rows, 0), device=self.device)
        self.made = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.last = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.order = torch.arange(self.rows, device=self.device)
        self.ends = torch.tensor(sorted(self.tokenizer.stop_tokens), device=self.device)
        self.longest_stop = max((len(stop.encode()) for stop in limits.stop), default=0)

    @torch.inference_mode()
    def decode(self) -> dict[int, Completion]:
        """The completions by their places."""
        while (self.waiting or self.jobs) and not self.stopped:
            free = self.rows - len(self.jobs)
            if self.waiting and (not self.jobs or free * REFILL_SHARE >= self.rows):
                self._admit(free)
            else:
                hidden = self.model(self.last[: len(self.jobs), None], cache=self.cache)
                self._draw(self.model.logits(hidden[:, 0]), slice(0, len(self.jobs)))
            self._retire()
        return self.completions

    def _admit(self, free: int) -> None:
        """Give the free rows to waiting jobs, read their prompts, and draw the first token of each."""
        first = len(self.jobs)
        jobs = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        rows: dict[int, list[int]] = {}
        for row, job in enumerate(jobs, start=first):
            rows.setdefault(job.prompt, []).append(row)
        fresh = {prompt: group[0] for prompt, group in rows.items() if prompt != self.held.prompt}
        self.cache.clear(list(fresh.values()))
        logits = self._read(fresh)
        if self.held.prompt in rows:
            logits[self.held.prompt] = self.held.logits
        leaders = {self.held.prompt: self.rows, **fresh}
        told = [(leaders[prompt], row) for prompt, group in rows.items() for row in group if row != leaders[prompt]]
        self.cache.copy([leader for leader, _ in told], [row for _, row in told])
        after = jobs[-1].prompt
        if self.waiting and self.waiting[0].prompt == after != self.held.prompt:
            self.cache.copy([fresh[after]], [self.rows])
            self.held = _Held(after, logits[after])
        self.jobs += jobs
        span = slice(first, len(self.jobs))
        self.uniforms[span] = torch.from_numpy(np.stack([self.streams.of(job) for job in jobs])).to(self.device)
        self.made[span] = 0
        self._draw(torch.stack([logits[job.prompt] for job in jobs]), span)

    def _read(self, leaders: dict[int, int]) -> dict[int, Float[Tensor, " vocab"]]:
        """Read each prompt into its row; the logits of the token after it."""
        logits: dict[int, Tensor] = {}
        left = sorted(leaders, key=lambda prompt: len(self.prompts[prompt]))
        while left:
            longest = len(self.prompts[left[-1]])
            some = left[-max(1, PREFILL_SCORES // longest**2) :]
            del left[-len(some) :]
            counts = [len(self.prompts[prompt]) for prompt in some]
            padded = np.zeros((len(some), longest), dtype=np.int64)
            for place, prompt in enumerate(some):
                padded[place, : counts[place]] = self.prompts[prompt]
            tokens = torch.from_numpy(padded).to(self.device)
            hidden = self.model(tokens, cache=self.cache, rows=[leaders[prompt] for prompt in some], counts=counts)
            ends = torch.tensor(counts, device=self.device) - 1
            after = self.model.logits(hidden[torch.arange(len(some), device=self.device), ends])
            logits.update(zip(some, after.unbind(), strict=True))
        return logits

    def _draw(self, logits: Float[Tensor, "row vocab"], rows: slice) -> None:
        order, made = self.order[rows], self.made[rows]
        tokens, logprobs = draw(logits, self.uniforms[order, made], self.limits)
        self.tokens[order, made] = tokens
        self.logprobs[order, made] = logprobs
        if self.raw.shape[1]:
            self.raw[order, made] = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        self.last[rows] = tokens
        self.made[rows] += 1

    def _retire(self) -> None:
        """Take the finished rows out; the last rows move into their places."""
        active = len(self.jobs)
        over = self.made[:active] >= self.limits.max_new_tokens
        ended = (self.last[:active, None] == self.ends).any(dim=1)
        done = set((over | ended).nonzero()[:, 0].tolist())
        if self.limits.stop and active:
            done |= self._stopped(active)
        for row in done:
            self._finish(row)
        left = active - len(done)
        gaps = sorted(row for row in done if row < left)
        moved = [row for row in range(left, active) if row not in done]
        self.cache.copy(moved, gaps)
        for gap, row in zip(gaps, moved, strict=True):
            self.jobs[gap] = self.jobs[row]
        del self.jobs[left:]
        if moved:
            for state in (self.uniforms, self.tokens, self.logprobs, self.raw, self.made, self.last):
                state[gaps] = state[moved]

    def _stopped(self, active: int) -> set[int]:
        """The rows whose newest token completed a stop string.

        A string of n bytes lies within the last n tokens; one more is looked at, since it may begin in the middle.
        """
        window = min(self.longest_stop + 1, self.limits.max_new_tokens)
        made = self.made[:active]
        places = (made[:, None] + torch.arange(-window, 0, device=self.device)).clamp(min=0)
        tails = self.tokens[:active].gather(1, places).tolist()
        texts = [self.tokenizer.decode(tail[-length:]) for tail, length in zip(tails, made.tolist(), strict=True)]
        return {row for row, text in enumerate(texts) if any(stop in text for stop in self.limits.stop)}

    def _finish(self, row: int) -> None:
        """Write down what the row made."""
        length = int(self.made[row])
        tokens = self.tokens[row, :length].tolist()
        logprobs = self.logprobs[row, :length].tolist()
        ended = tokens[-1] in self.tokenizer.stop_tokens
        text, stop = self.tokenizer.decode(tokens[:-1] if ended else tokens), "end" if ended else "length"
        found = [text.find(wanted) for wanted in self.limits.stop if wanted in text]
        if found:
            text, stop = text[: min(found)], "stop"
        raw = tuple(self.raw[row, :length].tolist())
        self.completions[self.jobs[row].place] = Completion(
            tuple(tokens), tuple(logprobs), text, stop, self.policy, raw
        )


def draw(
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, " row"], limits: Limits
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token a row by inverse transform, and its log-probability in nats under the distribution drawn from.

    Greedy decoding (temperature 0) is a distribution of one token, whose log-probability is 0.
    """
    if limits.temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    scaled = logits if limits.temperature == 1 else logits.float() / limits.temperature
    if limits.top_p < 1 or limits.top_k > 0 or limits.min_p > 0:
        scaled = truncate(scaled.float(), top_p=limits.top_p, top_k=limits.top_k, min_p=limits.min_p)
    probabilities = torch.softmax(scaled, dim=-1, dtype=torch.float32)
    missing = -probabilities.shape[1] % DRAW_BLOCK
    blocks = functional.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = blocks.unflatten(1, (-1, DRAW_BLOCK))
    masses = blocks.sum(dim=-1)
    block, before = _invert(masses, uniform * masses.sum(dim=-1))
    chosen = blocks[torch.arange(len(block), device=block.device), block]
    place, _ = _invert(chosen, uniform * masses.sum(dim=-1) - before)
    tokens = block * DRAW_BLOCK + place
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def _invert(
    masses: Float[Tensor, "row n"], wanted: Float[Tensor, " row"]
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """Where the running sum of the masses first exceeds what is wanted, and the sum before that place.

    It is always a place that has a mass: rounding may ask for all of them or more, or for less than nothing.
    """
    sums = masses.cumsum(dim=-1)
    total = sums[:, -1]
    # strictly below the total, so that the first step above it belongs to a place that has a mass
    below = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, below.clamp(min=0)[:, None], right=True)
    return place[:, 0], (sums.gather(1, place) - masses.gather(1, place))[:, 0]


class _Streams:
    """A stream of numbers in [0, 1) for each completion: Philox, keyed by the request and the sample's number."""

    def __init__(self, prompts: Sequence[Sequence[int]], limits: Limits) -> None:
        seen: Counter[tuple[int, ...]] = Counter()
        self.length = limits.max_new_tokens
        self.keys: list[int] = []
        for prompt in prompts:
            repeat = seen[tuple(prompt)]
            seen[tuple(prompt)] += 1
            self.keys.append(seed_for(limits.seed, list(prompt), repeat))

    def of(self, job: _Job) -> np.ndarray:
        key = np.array([self.keys[job.prompt], job.sample], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).random(self.length, dtype=np.float32)
