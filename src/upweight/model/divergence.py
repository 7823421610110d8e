"""Divergence between a teacher's and the policy's next-token distributions, without logits of every position.

    forward          KL(teacher || policy) = sum_v t (log t - log p)
    reverse          KL(policy || teacher) = sum_v p (log p - log t)
    jensen_shannon   (KL(teacher || m) + KL(policy || m)) / 2,   m = (t + p) / 2

A live teacher gives hidden states and its unembedding. A cached teacher gives the log-probabilities of its likeliest
tokens; all other tokens are one more event for both sides, whose probability is what is left. Merging events can only
lower a divergence, so the cached value is a lower bound that tightens as more tokens are stored.

One product with the unembedding gives a position's divergence and its target's log-probability (`scored_kl`). Gradients
are written out: with G_v = dD / d log p_v,

    dD / dz_v = (G_v - p_v sum_u G_u) / temperature
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.logprobs import add_product, compute_dtype, keeps_logits, positions_at_once
from upweight.model.precision import wide_dtype
from upweight.model.products import linear, mm

Direction = Literal["forward", "reverse", "jensen_shannon"]
LN_2 = math.log(2)
LEAST_PROBABILITY = 1e-30
"""What all tokens that are not stored have together at least: a logarithm of 0 would end the run."""


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """A teacher that runs beside the policy. Its vocabulary is the policy's; the width is its own."""

    hidden: Float[Tensor, "n teacher_width"]
    unembedding: Float[Tensor, "vocab teacher_width"]


@dataclass(frozen=True, slots=True)
class CachedTeacher:
    """What a teacher was stored as.

    Attributes:
        tokens: its likeliest tokens at each position.
        logprobs: their log-probabilities in nats at `temperature`, over the whole vocabulary.
        rest: the log-probability of all other tokens together; None where it is what the stored ones leave of 1.
    """

    tokens: Int[Tensor, "n kept"]
    logprobs: Float[Tensor, "n kept"]
    temperature: float = 1.0
    rest: Float[Tensor, " n"] | None = None

    def events(self, part: slice, dtype: torch.dtype) -> Float[Tensor, "n event"]:
        """Log-probabilities of the stored tokens and, as the last event, of all others together. They sum to 1."""
        stored = self.logprobs[part].to(dtype)
        if self.rest is None:
            left = (1 - stored.exp().sum(-1, keepdim=True)).clamp(min=LEAST_PROBABILITY).log()
            return torch.cat((stored, left), dim=-1)
        return torch.cat((stored, self.rest[part, None].to(dtype)), dim=-1).log_softmax(-1)

    def at(self, places: Bool[Tensor, " all"]) -> "CachedTeacher":
        """The same at some of the positions."""
        rest = None if self.rest is None else self.rest[places]
        return CachedTeacher(self.tokens[places], self.logprobs[places], self.temperature, rest)

    def to(self, device: torch.device | str) -> "CachedTeacher":
        """The same on another device."""
        rest = None if self.rest is None else self.rest.to(device)
        return CachedTeacher(self.tokens.to(device), self.logprobs.to(device), self.temperature, rest)

    def tail(self) -> Float[Tensor, " n"]:
        """The probability of the tokens that are not stored, at each position."""
        if self.rest is not None:
            return self.rest.exp()
        return (1 - self.logprobs.exp().sum(-1)).clamp(min=0)


class TokenTerms(NamedTuple):
    """Of each position: the target's log-probability at temperature 1, and the divergence; both in nats."""

    logprobs: Float[Tensor, " n"]
    divergence: Float[Tensor, " n"]


def chunked_kl(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    teacher: LiveTeacher | CachedTeacher,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> Float[Tensor, " n"]:
    """The divergence at each position in nats, at `temperature` on both sides, not multiplied by its square.

    The gradient goes to the policy alone.

    Args:
        vocabulary: the tokens that are compared, the first so many of both sides; None compares all, and then both
            sides have to have equally many. For models of one tokenizer whose embeddings are padded to other sizes.

    Raises ValueError where the teacher is of another length or vocabulary, or was stored at another temperature: its
    logits cannot be had back from a part of its probabilities.
    """
    settings = _settings(hidden, unembedding, teacher, temperature, direction, vocabulary, chunk)
    divergence: Tensor = _Terms.apply(hidden, unembedding, None, settings)[1]
    return divergence


def scored_kl(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " n"],
    teacher: LiveTeacher | CachedTeacher,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> TokenTerms:
    """`chunked_kl` and the log-probability of each target, for the price of one of them."""
    settings = _settings(hidden, unembedding, teacher, temperature, direction, vocabulary, chunk)
    return TokenTerms(*_Terms.apply(hidden, unembedding, targets, settings))


class _Settings(NamedTuple):
    teacher: LiveTeacher | CachedTeacher
    temperature: float
    direction: Direction
    vocabulary: int
    chunk: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.dtype)


def _settings(
    hidden: Tensor,
    unembedding: Tensor,
    teacher: LiveTeacher | CachedTeacher,
    temperature: float,
    direction: Direction,
    vocabulary: int | None,
    chunk: int | None,
) -> _Settings:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: a distribution needs one above 0")
    if direction not in ("forward", "reverse", "jensen_shannon"):
        raise ValueError(f'direction is "{direction}": expected "forward", "reverse" or "jensen_shannon"')
    compared = len(unembedding) if vocabulary is None else vocabulary
    if not 0 < compared <= len(unembedding):
        raise ValueError(f"the policy has {len(unembedding):,} tokens, {compared:,} are to be compared")
    if isinstance(teacher, LiveTeacher):
        length = len(teacher.hidden)
        if len(teacher.unembedding) < compared or (vocabulary is None and len(teacher.unembedding) != compared):
            raise ValueError(
                f"the teacher has {len(teacher.unembedding):,} tokens and the policy {compared:,}: token-level "
                "distillation needs one vocabulary"
            )
    else:
        length = len(teacher.tokens)
        if teacher.temperature != temperature:
            raise ValueError(f"the teacher was stored at temperature {teacher.temperature}, asked for {temperature}")
        if length and int(teacher.tokens.max()) >= compared:
            raise ValueError(f"the stored teacher names token {int(teacher.tokens.max())} of {compared}")
    if length != len(hidden):
        raise ValueError(f"the teacher has {length} positions and the policy {len(hidden)}: expected the same ones")
    size = chunk if chunk is not None else positions_at_once(hidden, len(unembedding), copies=4)
    return _Settings(teacher, temperature, direction, compared, size, compute_dtype(hidden))


class _Terms(torch.autograd.Function):
    """Both terms of each position, a chunk at a time; where many are asked for, the backward pass computes them again.

    What is kept of a position's logits: dD / dz, and where there are targets the probabilities at temperature 1.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        divergence = hidden.new_empty(len(hidden), dtype=settings.wide)
        logprobs = torch.zeros_like(divergence)
        trained = any(ctx.needs_input_grad)
        keeps = trained and keeps_logits(hidden, 2 * len(unembedding), settings.chunk)
        kept: list[_Chunk] = []
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, teachers = unembedding.to(settings.dtype), _teachers(settings)
            for part in _parts(len(hidden), settings.chunk):
                found = _chunk(hidden[part].to(settings.dtype), matrix, teachers, part, targets, settings, keeps)
                divergence[part] = found.divergence
                if found.logprobs is not None:
                    logprobs[part] = found.logprobs
                if keeps:
                    kept.append(found)
        ctx.save_for_backward(hidden, unembedding, targets)
        ctx.settings, ctx.kept = settings, kept
        return logprobs, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, unembedding, targets = ctx.saved_tensors
        settings: _Settings = ctx.settings
        by_logprob, by_divergence = gradients
        matrix, teachers = unembedding.to(settings.dtype), _teachers(settings)
        hidden_gradient = torch.empty_like(hidden)
        gradient = torch.zeros_like(unembedding)
        waiting = ctx.kept[::-1]
        ctx.kept = []
        for part in _parts(len(hidden), settings.chunk):
            read = hidden[part].to(settings.dtype)
            # let go of as soon as it was used
            found = waiting.pop() if waiting else _chunk(read, matrix, teachers, part, targets, settings, True)
            by_logit = found.slope.mul_(by_divergence[part, None])
            if targets is not None:
                by_logit.addcmul_(found.probabilities, by_logprob[part, None].to(by_logit.dtype), value=-1)
                by_logit.scatter_add_(1, targets[part, None], by_logprob[part, None].to(by_logit.dtype))
            hidden_gradient[part] = mm(by_logit, matrix)
            add_product(gradient, by_logit.t(), read)
        return hidden_gradient, gradient, None, None


class _Chunk(NamedTuple):
    """What is found out about some positions. `slope` is dD / dz; it and `probabilities` are there for a gradient."""

    divergence: Tensor
    logprobs: Tensor | None
    slope: Tensor
    probabilities: Tensor


def _teachers(settings: _Settings) -> Tensor | None:
    """The live teacher's unembedding, of the tokens that are compared."""
    if isinstance(settings.teacher, CachedTeacher):
        return None
    return settings.teacher.unembedding[: settings.vocabulary].to(settings.dtype)


def _chunk(
    hidden: Tensor,
    matrix: Tensor,
    teachers: Tensor | None,
    part: slice,
    targets: Tensor | None,
    settings: _Settings,
    sloped: bool,
) -> _Chunk:
    logits = linear(hidden, matrix).to(settings.wide)
    vocab, compared = logits.shape[1], settings.vocabulary
    tempered = logits[:, :compared]
    if settings.temperature != 1.0:
        tempered = tempered / settings.temperature
    log_p = tempered.log_softmax(-1)
    teacher = settings.teacher
    if isinstance(teacher, LiveTeacher):
        assert teachers is not None
        log_t = linear(teacher.hidden[part].to(settings.dtype), teachers).to(settings.wide)
        if settings.temperature != 1.0:
            log_t = log_t.div_(settings.temperature)
        log_t = log_t.log_softmax(-1)
        divergence, by_event = _between(log_t, log_p, settings.direction, sloped)
        del log_t
        probabilities = log_p.exp()
        if sloped:
            by_event.sub_(probabilities * by_event.sum(-1, keepdim=True))
        slope = by_event
    else:
        probabilities = log_p.exp()
        divergence, slope = _stored(teacher, part, log_p, probabilities, settings, sloped)
    logprobs = None
    if targets is not None:
        whole = settings.temperature == 1.0 and compared == vocab
        log_all = log_p if whole else logits.log_softmax(-1)
        logprobs = log_all.gather(1, targets[part, None])[:, 0]
        probabilities = probabilities if whole else log_all.exp()
    if not sloped:
        return _Chunk(divergence, logprobs, slope, probabilities)
    if settings.temperature != 1.0:
        slope = slope.div_(settings.temperature)
    slope = functional.pad(slope, (0, vocab - compared)) if compared < vocab else slope
    return _Chunk(divergence, logprobs, slope.to(settings.dtype), probabilities.to(settings.dtype))


def _stored(
    teacher: CachedTeacher, part: slice, log_p: Tensor, probabilities: Tensor, settings: _Settings, sloped: bool
) -> tuple[Tensor, Tensor]:
    """The divergence to a stored teacher and its slope: of the stored tokens, and of all others as one event."""
    tokens = teacher.tokens[part]
    held = probabilities.gather(1, tokens)
    others = probabilities.scatter(1, tokens, 0.0).sum(-1, keepdim=True).clamp(min=LEAST_PROBABILITY)
    events = torch.cat((log_p.gather(1, tokens), others.log()), dim=-1)
    divergence, by_event = _between(teacher.events(part, settings.wide), events, settings.direction, sloped)
    if not sloped:
        return divergence, by_event
    total = by_event.sum(-1, keepdim=True)
    # a token of the rest takes its part of the rest's slope, p / p_rest
    slope = probabilities * (by_event[:, -1:] / others - total)
    slope.scatter_(1, tokens, by_event[:, :-1] - held * total)
    return divergence, slope


def _between(log_t: Tensor, log_p: Tensor, direction: Direction, sloped: bool) -> tuple[Tensor, Tensor]:
    """The divergence over the last axis and, where asked for, its derivative by each log p."""
    if direction == "forward":
        t = log_t.exp()
        return (t * (log_t - log_p)).sum(-1), t.neg_() if sloped else t
    p = log_p.exp()
    if direction == "reverse":
        apart = log_p - log_t
        return (p * apart).sum(-1), p * (apart + 1) if sloped else p
    log_m = torch.logaddexp(log_t, log_p).sub_(LN_2)
    of_policy = p * (log_p - log_m)
    divergence = ((log_t.exp() * (log_t - log_m)).sum(-1) + of_policy.sum(-1)) / 2
    return divergence, of_policy / 2


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, count)) for start in range(0, count, chunk))
