"""Divergence between a teacher's and the policy's next-token distributions, without logits of every position.

    forward          KL(teacher || policy) = sum_v t (log t - log p)
    reverse          KL(policy || teacher) = sum_v p (log p - log t)
    jensen_shannon   (KL(teacher || m) + KL(policy || m)) / 2,   m = (t + p) / 2

A live teacher gives hidden states and its unembedding. A cached teacher gives the log-probabilities of its likeliest
tokens; all other tokens are one more event for both sides, whose probability is what is left. Merging events can only
lower a divergence, so the cached value is a lower bound that tightens as more tokens are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from upweight.model.logprobs import add_product, compute_dtype, positions_at_once

Direction = Literal["forward", "reverse", "jensen_shannon"]


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
        logprobs: their log-probabilities in nats at `temperature`, over the whole vocabulary (they sum to less than 1).
    """

    tokens: Int[Tensor, "n kept"]
    logprobs: Float[Tensor, "n kept"]
    temperature: float = 1.0


def chunked_kl(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    teacher: LiveTeacher | CachedTeacher,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    chunk: int | None = None,
) -> Float[Tensor, " n"]:
    """The divergence at each position in nats, at `temperature` on both sides, not multiplied by its square.

    The gradient goes to the policy alone. Raises ValueError where the teacher is of another length or vocabulary, or
    was stored at another temperature: its logits cannot be had back from a part of its probabilities.
    """
    _check(hidden, unembedding, teacher, temperature)
    size = chunk if chunk is not None else positions_at_once(hidden, len(unembedding), copies=4)

    def divergence(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = _teacher_events(teacher, part, temperature)
        log_policy = (logits / temperature).log_softmax(-1)
        if isinstance(teacher, CachedTeacher):
            log_policy = _merge(log_policy, teacher.tokens[part])
        return _between(target, log_policy, direction)

    values: Tensor = _Chunked.apply(hidden, unembedding, divergence, size, compute_dtype(hidden))
    return values


def _check(hidden: Tensor, unembedding: Tensor, teacher: LiveTeacher | CachedTeacher, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: a distribution needs one above 0")
    if isinstance(teacher, LiveTeacher):
        length = len(teacher.hidden)
        if len(teacher.unembedding) != len(unembedding):
            raise ValueError(
                f"the teacher has {len(teacher.unembedding):,} tokens and the policy {len(unembedding):,}: token-level "
                "distillation needs one vocabulary"
            )
    else:
        length = len(teacher.tokens)
        if teacher.temperature != temperature:
            raise ValueError(f"the teacher was stored at temperature {teacher.temperature}, asked for {temperature}")
        if length and int(teacher.tokens.max()) >= len(unembedding):
            raise ValueError(f"the stored teacher names token {int(teacher.tokens.max())} of {len(unembedding)}")
    if length != len(hidden):
        raise ValueError(f"the teacher has {length} positions and the policy {len(hidden)}: expected the same ones")


def _teacher_events(teacher: LiveTeacher | CachedTeacher, part: slice, temperature: float) -> Tensor:
    """The teacher's log-probabilities of a chunk: of all tokens, or of the stored ones and of all others together."""
    if isinstance(teacher, LiveTeacher):
        logits = functional.linear(teacher.hidden[part], teacher.unembedding.to(teacher.hidden.dtype)).float()
        return (logits / temperature).log_softmax(-1)
    stored = teacher.logprobs[part].float()
    rest = torch.log1p(-stored.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    return torch.cat((stored, rest), dim=-1)


def _merge(log_policy: Tensor, tokens: Tensor) -> Tensor:
    """The policy's log-probabilities of the stored tokens and of all others together."""
    others = log_policy.scatter(1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((log_policy.gather(1, tokens), others), dim=-1)


def _between(log_t: Tensor, log_p: Tensor, direction: Direction) -> Tensor:
    if direction == "forward":
        return _kl(log_t, log_p)
    if direction == "reverse":
        return _kl(log_p, log_t)
    if direction == "jensen_shannon":
        log_m = torch.logaddexp(log_t, log_p) - torch.log(torch.tensor(2.0, device=log_t.device))
        return (_kl(log_t, log_m) + _kl(log_p, log_m)) / 2
    raise ValueError(f'direction is "{direction}": expected "forward", "reverse" or "jensen_shannon"')


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last axis."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


class _Chunked(torch.autograd.Function):
    """A value of each position's logits, a chunk at a time; the backward pass computes each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        function: Callable[[Tensor, slice], Tensor],
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, unembedding)
        ctx.function, ctx.chunk, ctx.dtype = function, chunk, dtype
        values = hidden.new_empty(len(hidden), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = unembedding.to(dtype)
            for part in _parts(len(hidden), chunk):
                values[part] = function(functional.linear(hidden[part].to(dtype), matrix).float(), part)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, unembedding = ctx.saved_tensors
        matrix = unembedding.to(ctx.dtype)
        hidden_gradient = torch.empty_like(hidden)
        gradient = torch.zeros_like(unembedding)
        for part in _parts(len(hidden), ctx.chunk):
            read = hidden[part].to(ctx.dtype)
            with torch.enable_grad():
                logits = functional.linear(read, matrix).float().detach().requires_grad_()
                (by_logit,) = torch.autograd.grad(ctx.function(logits, part), logits, gradients[0][part])
            by_logit = by_logit.to(ctx.dtype)
            hidden_gradient[part] = by_logit @ matrix
            add_product(gradient, by_logit.t(), read)
        return hidden_gradient, gradient, None, None, None


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
