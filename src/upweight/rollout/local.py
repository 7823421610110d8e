"""Sampling from a model in this process: batched decoding with a key/value cache on the trainer's own weights.

A prompt is read once and its cache copied to the rows of its group; a row whose completion ends takes the next one at
once, and when none waits the last row moves into its place, so that every step is over full rows.

Each completion has its own stream of uniform numbers, named by the seed, the prompt's tokens and the sample's number,
and a token is drawn by inverting the cumulative distribution. So the same request gives the same completion whatever
else is in the batch, up to the rounding of matrix products of another shape (about 1e-6 in a logit), which can only
matter where a uniform number falls into a gap of that size.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion
from upweight.model.cache import Cache
from upweight.model.logprobs import truncate
from upweight.model.transformer import Transformer
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Job:
    """One completion to make: which prompt, which of its samples, and its place in the results."""

    prompt: int
    sample: int
    place: int


class LocalSampler(Sampler):
    """Samples from a Transformer.

    Args:
        model: used as it is at each call; a trainer may change the weights between calls.
        tokenizer: its chat template renders conversations.
        batch_rows: completions decoded at once.
        policy: the fingerprint of the weights, written into each completion.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, batch_rows: int = 256, policy: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows
        self.policy = policy

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """`count` completions for each prompt; UserError where one leaves no room in the model's context."""
        read = [self._encode(prompt) for prompt in prompts]
        longest = max((len(tokens) for tokens in read), default=0)
        context = self.model.config.max_context
        if longest and longest + limits.max_new_tokens > context:
            raise UserError(
                f"the longest prompt has {longest} tokens and may grow by {limits.max_new_tokens}, but the model's "
                f"context is {context}: lower max_new_tokens, shorten the prompt or use a model of a longer context"
            )
        if not read or count < 1:
            return [[] for _ in read]
        with torch.inference_mode():
            run = _Run(self, read, count, limits)
            run.decode()
        return run.completions()

    def _encode(self, prompt: Prompt) -> list[int]:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else render(self.tokenizer, prompt)
        return list(tokens) or [self.tokenizer.end_of_text]


class _Run:
    """The state of one call: rows 0..active-1 of the cache are being decoded, row r making job `jobs[r]`."""

    def __init__(self, sampler: LocalSampler, prompts: list[list[int]], count: int, limits: Limits) -> None:
        self.sampler, self.prompts, self.count, self.limits = sampler, prompts, count, limits
        self.model, self.tokenizer = sampler.model, sampler.tokenizer
        parameter = self.model.embedding.weight
        self.device = parameter.device
        rows = min(sampler.batch_rows, len(prompts) * count)
        self.cache = Cache(
            self.model.config,
            rows=rows,
            capacity=max(map(len, prompts)) + limits.max_new_tokens,
            device=self.device,
            dtype=parameter.dtype,
        )
        total = len(prompts) * count
        self.waiting = deque(_Job(place // count, place % count, place) for place in range(total))
        self.uniforms = torch.from_numpy(_uniforms(prompts, count, limits)).to(self.device)
        self.tokens = torch.zeros(total, limits.max_new_tokens, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(total, limits.max_new_tokens, dtype=torch.float32, device=self.device)
        self.length = [0] * total
        self.stop = ["length"] * total
        self.texts: dict[int, str] = {}
        self.jobs: list[_Job] = []
        self.places = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.made = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.last = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.ends = torch.tensor(sorted({self.tokenizer.end_of_turn, self.tokenizer.end_of_text}), device=self.device)

    def decode(self) -> None:
        self._admit()
        while self.jobs:
            active = len(self.jobs)
            hidden = self.model(self.last[:active, None], cache=self.cache)
            self._draw(self.model.logits(hidden[:, 0]), slice(0, active))
            self._retire()
            self._admit()

    def _admit(self) -> None:
        """Fill the free rows with waiting jobs; a first token is drawn for each, and those that end at once retire."""
        while self.waiting and len(self.jobs) < self.cache.rows:
            first = len(self.jobs)
            jobs = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.cache.rows - first))]
            leaders: dict[int, int] = {}
            followers: dict[int, list[int]] = {}
            for row, job in enumerate(jobs, start=first):
                leader = leaders.setdefault(job.prompt, row)
                followers.setdefault(leader, []).append(row)
            self.cache.clear(range(first, first + len(jobs)))
            logits = self._prefill(leaders)
            for leader, rows in followers.items():
                self.cache.copy(leader, rows)
            self.jobs += jobs
            rows = slice(first, first + len(jobs))
            self.places[rows] = torch.tensor([job.place for job in jobs], device=self.device)
            self.made[rows] = 0
            order = list(leaders)
            index = torch.tensor([order.index(job.prompt) for job in jobs], device=self.device)
            self._draw(logits[index], rows)
            self._retire()

    def _prefill(self, leaders: dict[int, int]) -> Float[Tensor, "prompt vocab"]:
        """Read each prompt into its leader's row; the logits of the token after it."""
        counts = [len(self.prompts[prompt]) for prompt in leaders]
        padded = torch.zeros(len(counts), max(counts), dtype=torch.long, device=self.device)
        for place, prompt in enumerate(leaders):
            padded[place, : counts[place]] = torch.tensor(self.prompts[prompt], device=self.device)
        hidden = self.model(padded, cache=self.cache, rows=list(leaders.values()), counts=counts)
        ends = torch.tensor(counts, device=self.device) - 1
        return self.model.logits(hidden[torch.arange(len(counts), device=self.device), ends])

    def _draw(self, logits: Float[Tensor, "row vocab"], rows: slice) -> None:
        places, made = self.places[rows], self.made[rows]
        tokens, logprobs = draw(logits, self.uniforms[places, made], self.limits)
        self.tokens[places, made] = tokens
        self.logprobs[places, made] = logprobs
        self.last[rows] = tokens
        self.made[rows] += 1

    def _retire(self) -> None:
        """Take the finished rows out; the last rows move into their places."""
        active = len(self.jobs)
        ended = torch.isin(self.last[:active], self.ends)
        over = self.made[:active] >= self.limits.max_new_tokens
        done = dict.fromkeys(ended.nonzero()[:, 0].tolist(), "end")
        for row in (over & ~ended).nonzero()[:, 0].tolist():
            done[row] = "length"
        if self.limits.stop:
            self._match_stops(done)
        for row in sorted(done, reverse=True):
            place = self.jobs[row].place
            self.length[place] = int(self.made[row])
            self.stop[place] = done[row]
            final = len(self.jobs) - 1
            if row != final:
                self.cache.copy(final, [row])
                self.jobs[row] = self.jobs[final]
                for state in (self.places, self.made, self.last):
                    state[row] = state[final]
            self.jobs.pop()

    def _match_stops(self, done: dict[int, str]) -> None:
        for row, job in enumerate(self.jobs):
            if done.get(row) == "end":
                continue
            text = self.tokenizer.decode(self.tokens[job.place, : int(self.made[row])].tolist(), skip_special=True)
            found = [text.find(stop) for stop in self.limits.stop if stop in text]
            if found:
                done[row] = "stop"
                self.texts[job.place] = text[: min(found)]

    def completions(self) -> list[list[Completion]]:
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        made = [self._completion(place, tokens[place], logprobs[place]) for place in range(len(tokens))]
        return [made[start : start + self.count] for start in range(0, len(made), self.count)]

    def _completion(self, place: int, tokens: list[int], logprobs: list[float]) -> Completion:
        length, stop = self.length[place], self.stop[place]
        kept = tokens[:length]
        text = self.texts.get(place)
        if text is None:
            text = self.tokenizer.decode(kept[:-1] if stop == "end" else kept)
        return Completion(tuple(kept), tuple(logprobs[:length]), text, stop, self.sampler.policy)


def draw(
    logits: Float[Tensor, "row vocab"], uniform: Float[Tensor, " row"], limits: Limits
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token a row by inverse transform, and its log-probability in nats under the distribution drawn from.

    Greedy decoding (temperature 0) is a distribution of one token, whose log-probability is 0.
    """
    if limits.temperature == 0:
        return logits.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    scaled = logits.float() / limits.temperature
    scaled = truncate(scaled, top_p=limits.top_p, top_k=limits.top_k, min_p=limits.min_p)
    probabilities = torch.softmax(scaled, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    wanted = (uniform * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, wanted, right=True)
    # rounding can put `wanted` on the last step of the sum: the last token that has any probability then
    likely = (probabilities > 0).int()
    final = likely.shape[1] - 1 - likely.flip(-1).argmax(dim=-1, keepdim=True)
    tokens = torch.minimum(tokens, final)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


def _uniforms(prompts: list[list[int]], count: int, limits: Limits) -> np.ndarray:
    """A row of numbers in [0, 1) for each completion, from a stream of its own."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = np.empty((len(prompts) * count, limits.max_new_tokens), dtype=np.float32)
    for index, prompt in enumerate(prompts):
        repeat = seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
        for sample in range(count):
            key = seed_for(limits.seed, prompt, repeat, sample)
            stream = np.random.Generator(np.random.Philox(key=key))
            numbers[index * count + sample] = stream.random(limits.max_new_tokens, dtype=np.float32)
    return numbers
