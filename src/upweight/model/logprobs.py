"""Log-probabilities without logits: the hidden states go through the unembedding a chunk of positions at a time.

    log p(target) = z_target - log sum_v exp z_v,     z = unembedding hidden / temperature

A row x time x vocab tensor is never held. Where all logits together are few, they are kept for the gradient; otherwise
the backward pass computes each chunk's logits again. Both ways do the same arithmetic on the same chunks, so they give
the same bits. On CUDA a chunk is larger, and what lies between its matrix products is one compiled kernel each way.

`truncate` is the one definition of top-k, top-p and min-p: the sampler draws from what it leaves, and the trainer takes
log-probabilities under what it leaves.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.model import context
from upweight.model.precision import wide_dtype
from upweight.model.products import faster_in_float32, linear, mm

CHUNK_LOGITS = 1 << 23
"""Logits held at once on a CPU (32 MB in fp32): a chunk is this many divided by the vocabulary, in positions."""

KEPT_LOGITS = 1 << 25
"""Logits kept for the gradient on a CPU (128 MB in fp32), where it saves the products of the backward pass."""

ROWS_ADDED = 1 << 13
"""Rows of a gradient to which a bf16 product is added at once on a CPU, which makes an fp32 copy of the product."""

CUDA_CHUNK_BYTES = 1 << 30
"""The same on CUDA: small chunks would add to the gradient of the unembedding too often."""

CUDA_CHUNK_STEP = 128
"""Chunks are multiples of this, the tile of a matrix product."""


def truncate(
    logits: Float[Tensor, "*n vocab"], *, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Float[Tensor, "*n vocab"]:
    """The logits (already divided by the temperature) with -inf where a token may not be sampled.

    top_k keeps the k likeliest tokens; top_p then keeps the smallest set of the likeliest whose share of what is left
    reaches top_p; min_p drops what is below that share of the likeliest token's probability. Tokens as likely as the
    last one kept are kept too, so the result does not depend on the order of the vocabulary.
    """
    if top_k > 0 and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        logits = logits.masked_fill(logits < _nucleus_edge(logits, top_p), float("-inf"))
    if min_p > 0.0:
        least = logits.amax(dim=-1, keepdim=True) + torch.tensor(min_p, dtype=logits.dtype).log()
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits


def _nucleus_edge(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the nucleus."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    ranked = _descending(logits)
    shares = (ranked - total).exp().cumsum(dim=-1)
    last = (shares < top_p).sum(dim=-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return ranked.gather(-1, last)


def _descending(logits: Tensor) -> Tensor:
    """The values in falling order. On a CPU numpy sorts faster than torch finds the top 64."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(np.sort(logits.detach().neg().numpy(), axis=-1)).neg_()
    return logits.sort(dim=-1, descending=True).values


class TokenScores(NamedTuple):
    """Of each target token: its log-probability, and the log of the sum that normalises it (for z-loss), in nats."""

    logprobs: Float[Tensor, "*n"]
    log_normaliser: Float[Tensor, "*n"]


def token_scores(
    hidden: Float[Tensor, "*n width"],
    unembedding: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "*n"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    chunk: int | None = None,
) -> TokenScores:
    """Log-probability of each target and the log-normaliser, both with gradients to hidden states and unembedding.

    Args:
        temperature, top_p, top_k, min_p: the distribution that was sampled from. A target that truncation would drop
            counts as kept: it was sampled, so only rounding or a policy that moved on puts it outside, and -inf would
            end the run. Which tokens are kept is a constant for the gradient.
        chunk: positions at once; None takes as many as are fast on the device.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities of greedy decoding are not defined")
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    share = context.current() if len(flat) else None
    if share is not None:
        mine = context.scores_of(len(flat), share)
        flat, wanted = flat[mine], wanted[mine]
    size = chunk if chunk is not None else positions_at_once(flat, len(unembedding))
    settings = _Settings(temperature, top_p, top_k, min_p, size, compute_dtype(hidden))
    logprobs, normaliser = _TokenScores.apply(flat, unembedding, wanted, settings)
    if share is not None:
        both = context.gather_scores(torch.stack((logprobs, normaliser), dim=1), targets.numel(), share)
        logprobs, normaliser = both.unbind(1)
    return TokenScores(logprobs.view(targets.shape), normaliser.view(targets.shape))


def positions_at_once(hidden: Float[Tensor, "n width"], vocab: int, *, copies: int = 1) -> int:
    """The length of a chunk of logits, of which `copies` are held at a time."""
    if hidden.device.type != "cuda":
        return max(1, CHUNK_LOGITS // (copies * vocab))
    most = max(1, CUDA_CHUNK_BYTES // (copies * vocab * compute_dtype(hidden).itemsize))
    even = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most)))
    return max(1, math.ceil(even / CUDA_CHUNK_STEP) * CUDA_CHUNK_STEP)


def compute_dtype(hidden: Float[Tensor, "*n width"]) -> torch.dtype:
    """The dtype of products with the unembedding: autocast's where it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def token_logprobs(
    hidden: Float[Tensor, "*n width"],
    unembedding: Float[Tensor, "vocab width"],
    targets: Int[Tensor, "*n"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    chunk: int | None = None,
) -> Float[Tensor, "*n"]:
    """Log-probability in nats of each target token; see `token_scores`."""
    return token_scores(
        hidden, unembedding, targets, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, chunk=chunk
    ).logprobs


class _Settings(NamedTuple):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    chunk: int
    dtype: torch.dtype

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class _TokenScores(torch.autograd.Function):
    """d z = g_logprob (one_hot(target) - p) + g_normaliser p; everything else is a matrix product."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        count = len(hidden)
        logprobs = hidden.new_empty(count, dtype=wide_dtype(settings.dtype))
        normaliser = torch.empty_like(logprobs)
        keeps = any(ctx.needs_input_grad) and keeps_logits(hidden, len(unembedding), settings.chunk)
        kept: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = unembedding.to(settings.dtype)
            for start in range(0, count, settings.chunk):
                part = slice(start, min(start + settings.chunk, count))
                if _fuses(hidden, settings):
                    logits = linear(hidden[part].to(settings.dtype), matrix)
                    logprobs[part], normaliser[part] = _fused_scores()(logits, targets[part], settings.temperature)
                    kept += [logits] if keeps else []
                    continue
                logits = _logits(hidden[part], matrix, targets[part], settings)
                chosen = logits.gather(1, targets[part, None])[:, 0]
                probabilities, normaliser[part] = _softmax(logits)
                logprobs[part] = chosen - normaliser[part]
                kept += [probabilities] if keeps else []
        ctx.save_for_backward(hidden, unembedding, targets, normaliser)
        ctx.kept, ctx.settings = kept, settings
        return logprobs, normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, unembedding, targets, normaliser = ctx.saved_tensors
        settings: _Settings = ctx.settings
        by_logprob, by_normaliser = (gradient / settings.temperature for gradient in gradients)
        matrix = unembedding.to(settings.dtype)
        hidden_gradient = torch.empty_like(hidden)
        gradient = torch.zeros_like(unembedding)
        waiting: list[Tensor] = ctx.kept[::-1]
        ctx.kept = []
        for start in range(0, len(hidden), settings.chunk):
            part = slice(start, min(start + settings.chunk, len(hidden)))
            kept = waiting.pop() if waiting else None  # let go of as soon as it was used
            if _fuses(hidden, settings):
                logits = linear(hidden[part].to(settings.dtype), matrix) if kept is None else kept
                weights = (normaliser[part], by_logprob[part], by_normaliser[part])
                by_logit = _fused_gradient()(logits, targets[part], *weights, settings.temperature)
                del kept, logits
            else:
                by_logit = _softmax(_logits(hidden[part], matrix, targets[part], settings))[0] if kept is None else kept
                del kept
                by_logit.mul_((by_normaliser[part] - by_logprob[part])[:, None])
                by_logit.scatter_add_(1, targets[part, None], by_logprob[part, None])
                by_logit = by_logit.to(settings.dtype)
            hidden_gradient[part] = mm(by_logit, matrix)
            add_product(gradient, by_logit.t(), hidden[part].to(settings.dtype))
        return hidden_gradient, gradient, None, None


def keeps_logits(hidden: Tensor, vocab: int, chunk: int) -> bool:
    """Whether what the gradient needs of all logits is kept instead of computed again."""
    return len(hidden) <= chunk or (hidden.device.type == "cpu" and len(hidden) * vocab <= KEPT_LOGITS)


def _fuses(hidden: Tensor, settings: _Settings) -> bool:
    return hidden.device.type == "cuda" and not settings.truncates


@functools.cache
def _fused_scores() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_scores_of_logits)


@functools.cache
def _fused_gradient() -> Callable[..., Tensor]:
    return torch.compile(_gradient_by_logit)


def _scores_of_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = logits.float() / temperature
    normaliser = wide.logsumexp(dim=-1)
    return wide.gather(1, targets[:, None])[:, 0] - normaliser, normaliser


def _gradient_by_logit(
    logits: Tensor, targets: Tensor, normaliser: Tensor, by_logprob: Tensor, by_normaliser: Tensor, temperature: float
) -> Tensor:
    probabilities = (logits.float() / temperature - normaliser[:, None]).exp()
    chosen = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    by_logit = probabilities * (by_normaliser - by_logprob)[:, None] + torch.where(chosen, by_logprob[:, None], 0.0)
    return by_logit.to(logits.dtype)


def add_product(total: Float[Tensor, "rows columns"], left: Tensor, right: Tensor) -> None:
    """total += left right, added up in the dtype of `total` though the factors may be of a shorter one.

    On a CPU each product is rounded to the dtype of its factors first: it has no kernel that would not.
    """
    if left.dtype == total.dtype:
        if total.dtype == torch.float32 and total.device.type == "cpu" and faster_in_float32():
            for start in range(0, len(total), ROWS_ADDED):
                rows = slice(start, start + ROWS_ADDED)
                total[rows].add_(mm(left[rows], right))
        else:
            total.addmm_(left, right)
    elif total.device.type != "cuda" or total.dtype != torch.float32:
        for start in range(0, len(total), ROWS_ADDED):
            rows = slice(start, start + ROWS_ADDED)
            total[rows].add_(torch.mm(left[rows], right))
    elif _adds_in_float32():
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))


@functools.cache
def _adds_in_float32() -> bool:
    """Whether this torch adds a product of bfloat16 factors to a float32 sum in one kernel."""
    short = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    total = torch.ones(16, 16, device="cuda")
    try:
        torch.addmm(total, short, short, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _logits(hidden: Tensor, matrix: Tensor, targets: Tensor, settings: _Settings) -> Tensor:
    """Tempered logits of one chunk in float32 or wider, -inf outside the truncation but for the target."""
    logits = linear(hidden.to(settings.dtype), matrix).to(wide_dtype(settings.dtype))
    if settings.temperature != 1.0:
        logits = logits.div_(settings.temperature)
    if settings.truncates:
        chosen = targets[:, None]
        held = logits.gather(1, chosen)
        logits = truncate(logits, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p)
        logits = logits.scatter(1, chosen, held)
    return logits


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-normaliser with one exponential a logit."""
    probabilities = torch.softmax(logits, dim=-1)
    # the likeliest token has probability exp(max - log_normaliser), so the softmax already holds the normaliser
    return probabilities, logits.amax(dim=-1) - probabilities.amax(dim=-1).log()
