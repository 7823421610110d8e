"""DPD, dual-level preference distillation (arXiv 2512.06266, section 4).

    L = w_s L_dpo + w_p L_pos + w_n L_neg,     weight = pairs

    L_dpo = -log sigmoid(beta ((log p(y+) - log p_ref(y+)) - (log p(y-) - log p_ref(y-))))
    L_pos = D(teacher, policy) over the tokens of the positive response y+
    L_neg = D(teacher, policy) over the tokens of the student's own negative response y-

log p(y) is the sum of the response's token log-probabilities in nats (Rafailov et al., arXiv 2305.18290); the prompt is
context. D is a divergence of next-token distributions, KL(teacher || policy) by default, at every response token, and
averaged over the response's tokens. The report gives neither coefficients, direction, temperature nor normalisation:
every one is a field, and docs/equations.md says why its default is what it is.

With some weights at 0 what remains is its textbook loss: (1, 0, 0) is DPO, (0, 1, 0) distillation on positives,
(0, 0, 1) on-policy distillation on the student's own responses. A term of weight 0 is not computed: DPO alone needs no
teacher, distillation alone no reference.

One forward pass of the policy, the product with its unembedding included, serves all three terms. A term whose teacher
is missing, of another vocabulary, NaN, constant or the policy itself is an error, never a silent zero.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from upweight.core.batches import Loss, TokenBatch
from upweight.core.errors import UserError
from upweight.core.packing import Continuation, bundles, pack_bundles
from upweight.core.protocols import Objective
from upweight.model.divergence import CachedTeacher, Direction, LiveTeacher, chunked_kl, scored_kl
from upweight.model.logprobs import token_logprobs
from upweight.store.signal import Signal

Normalise = Literal["token", "sequence"]
Members = Literal["both", "chosen", "rejected"]
"""Which responses of its pairs a batch holds: distillation on one side alone need not read the other."""

POSITIONS_LOOKED_AT = 16
SAME_DISTRIBUTION = 1e-6
"""Nats: a divergence that stays below this at every token of a batch means that teacher and policy are one model. Two
evaluations of one model differ by about 1e-7 in float32."""


class TeacherError(UserError):
    """The teacher cannot teach: it is missing, of another vocabulary, NaN, constant, or the student itself."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A prompt and two responses as tokens, with the reference's log-probability of each response in nats.

    Raises UserError where a response is empty or both are the same: nothing can be preferred.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reference_chosen: float = math.nan
    reference_rejected: float = math.nan

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a pair has an empty prompt: its responses' first token would be predicted from nothing")
        if not self.chosen or not self.rejected:
            which = "chosen" if not self.chosen else "rejected"
            raise UserError(
                f"the {which} response of a pair is empty: drop the pair, a response has at least one token"
            )
        if self.chosen == self.rejected:
            raise UserError(
                f"both responses of a pair are the same {len(self.chosen)} tokens: neither is better, drop the pair"
            )


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Preference pairs whose sequences (prompt and response) are packed. A prompt that both members share is read once.

    Attributes:
        sequences: loss weights mark the response tokens.
        chosen, rejected: the sequence of each pair's members; -1 where the batch does not hold it.
        reference: log-probability of each sequence's response under the reference, in nats; nan where not computed, and
            0 for a shared prompt, which is a sequence of its own.
        cached: a stored teacher at the response tokens, in the order of the batch; None where the teacher is live.
        taught: at which response tokens `cached` has a distribution; None at all of them.
    """

    sequences: TokenBatch
    chosen: Int[Tensor, " pair"]
    rejected: Int[Tensor, " pair"]
    reference: Float[Tensor, " sequence"]
    cached: CachedTeacher | None = None
    taught: Bool[Tensor, " n"] | None = None

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        return self.sequences.token_count

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on another device."""
        taught = None if self.taught is None else self.taught.to(device)
        return PairBatch(
            self.sequences.to(device),
            self.chosen.to(device),
            self.rejected.to(device),
            self.reference.to(device),
            self.cached and self.cached.to(device),
            taught,
        )


def pair_batch(
    pairs: Sequence[EncodedPair],
    row_tokens: int,
    signal: Signal | None = None,
    members: Members = "both",
    *,
    share_prompts: bool = True,
) -> PairBatch:
    """The pairs as one packed batch: pair by pair the chosen member, then the rejected one.

    Args:
        row_tokens: places of a row where nothing is shared; rows are longer where a member is.
        signal: where a teacher was stored; UserError where it knows nothing of a member.
        members: which of them are read; `Dpd.members` says what an objective needs.
        share_prompts: read a prompt once for the members that follow it, all in one row; the same loss and gradient, up
            to rounding. For policies and teachers that take `prefixes`.
    """
    if not pairs:
        raise UserError("a batch of no pairs: there is nothing to prefer")
    held: list[Continuation] = []
    reference = []
    for pair in pairs:
        if members != "rejected":
            held.append(Continuation(pair.prompt, pair.chosen, [1.0] * len(pair.chosen)))
            reference.append(pair.reference_chosen)
        if members != "chosen":
            held.append(Continuation(pair.prompt, pair.rejected, [1.0] * len(pair.rejected)))
            reference.append(pair.reference_rejected)
    shared = bundles(held, sys.maxsize) if share_prompts else [[index] for index in range(len(held))]
    sequences, owned = pack_bundles([[held[index] for index in bundle] for bundle in shared], row_tokens)
    places = torch.from_numpy(owned)
    by_sequence = torch.zeros(int(sequences.segments.max()) + 1, dtype=torch.float64)
    by_sequence[places] = torch.tensor(reference, dtype=torch.float64)
    cached, taught = (None, None)
    if signal is not None:
        cached, taught = _stored(dict(zip(owned.tolist(), held, strict=True)), sequences, signal)
    absent = torch.full((len(pairs),), -1)
    chosen = absent if members == "rejected" else places[:: 2 if members == "both" else 1]
    rejected = {"both": places[1::2], "chosen": absent, "rejected": places}[members]
    return PairBatch(sequences, chosen, rejected, by_sequence, cached, taught)


def _stored(
    held: Mapping[int, Continuation], sequences: TokenBatch, signal: Signal
) -> tuple[CachedTeacher, Bool[Tensor, " n"] | None]:
    """What is stored of every response token, in the order in which the rows hold them; `held` by sequence."""
    owners = sequences.segments[sequences.weights > 0].unique_consecutive().tolist()
    read = [signal.read(held[owner].prompt, held[owner].tokens) for owner in owners]
    tokens, logprobs, rest = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*(one[:3] for one in read), strict=True)
    )
    taught = torch.from_numpy(np.concatenate([one.taught for one in read]))
    return CachedTeacher(tokens, logprobs, signal.temperature, rest), None if bool(taught.all()) else taught


def sequence_loss(
    policy_chosen: Float[Tensor, " pair"],
    policy_rejected: Float[Tensor, " pair"],
    reference_chosen: Float[Tensor, " pair"],
    reference_rejected: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """L_dpo of each pair, from the log-probabilities of whole responses in nats."""
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -logsigmoid(beta * margin)


def token_kl(
    teacher: Float[Tensor, "pair time vocab"],
    policy: Float[Tensor, "pair time vocab"],
    response: Bool[Tensor, "pair time"],
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Float[Tensor, " pair"]:
    """KL(teacher || policy) in nats of two sets of logits, summed over the response tokens of each pair.

    The same as model/divergence.chunked_kl on logits that are at hand; the objective never holds them all.

    Args:
        direction: "forward" is KL(teacher || policy), "reverse" KL(policy || teacher), "jensen_shannon" the mean
            divergence of both to their mean.
    """
    log_t, log_p = (teacher / temperature).log_softmax(-1), (policy / temperature).log_softmax(-1)
    if direction == "forward":
        per_token = (log_t.exp() * (log_t - log_p)).sum(-1)
    elif direction == "reverse":
        per_token = (log_p.exp() * (log_p - log_t)).sum(-1)
    else:
        log_m = torch.logaddexp(log_t, log_p) - math.log(2)
        per_token = ((log_t.exp() * (log_t - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
    return per_token.masked_fill(~response, 0.0).sum(-1)


@dataclass(frozen=True)
class Dpd(Objective):
    """Attributes:
    teacher: a live model of the policy's vocabulary, called like the policy and without gradient; None where batches
        carry a cached teacher, or where positive and negative are 0.
    beta: how strongly the margin over the reference counts.
    sequence, positive, negative: the weights of L_dpo, L_pos and L_neg.
    direction, temperature: of the divergence; both models' logits are divided by the temperature. The divergence is not
        multiplied by its square.
    normalise: "token" averages the divergence over the tokens of each response, so that long responses do not outweigh
        L_dpo and short ones; "sequence" sums it.
    vocabulary: the tokens whose distributions are compared, the first so many of both models; None compares all, and
        then a teacher of another number is refused. For checkpoints of one tokenizer that pad their embeddings to
        different sizes.
    """

    teacher: Any = field(default=None, repr=False, compare=False)
    beta: float = 0.1
    sequence: float = 1.0
    positive: float = 1.0
    negative: float = 1.0
    direction: Direction = "forward"
    temperature: float = 1.0
    normalise: Normalise = "token"
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        weights = (self.sequence, self.positive, self.negative)
        if min(weights) < 0 or max(weights) == 0:
            raise UserError(f"DPD with the weights {weights}: none may be below 0, and one has to be above")
        if self.beta <= 0 or self.temperature <= 0:
            raise UserError(f"DPD with beta {self.beta} and temperature {self.temperature}: both must be above 0")

    @property
    def members(self) -> Members:
        """Which responses the terms need."""
        if self.sequence or (self.positive and self.negative):
            return "both"
        return "chosen" if self.positive else "rejected"

    def identity(self) -> dict[str, Any]:
        """The settings, as plain JSON."""
        names = ("beta", "sequence", "positive", "negative", "direction", "temperature", "normalise", "vocabulary")
        return {name: getattr(self, name) for name in names}

    def __call__(self, policy: Any, batch: PairBatch) -> Loss:
        """The joint loss summed over the pairs; the weight is the number of pairs.

        Logged: `dpo`, `positive` and `negative` (before their weights), `margin` in nats and `accuracy`, the share of
        pairs whose margin is above 0. With a cached teacher also `teacher_tail`, the probability that it did not store,
        and `taught`, the share of tokens that it has a distribution for.
        """
        sequences = batch.sequences
        trained = sequences.weights > 0
        owner = sequences.segments[trained]
        count = batch.reference.shape[0]
        lengths = _by_sequence(torch.ones_like(owner, dtype=torch.float32), owner, count)
        _check_responses(lengths, batch)
        for name, members in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            if self.members in ("both", name) and bool((members < 0).any()):
                raise UserError(f"the batch does not hold the {name} responses that the loss is over: see pair_batch")
        reference = _known(batch.reference) if self.sequence else batch.reference
        hidden = sequences.read_by(policy)[trained]
        targets = sequences.targets[trained]
        logprobs = divergence = None
        if self.positive or self.negative:
            logprobs, divergence = self._divergence(policy, hidden, targets, batch, owner)
        elif self.sequence:
            logprobs = token_logprobs(hidden, policy.unembedding, targets)
        pairs = lengths.new_tensor(len(batch.chosen))
        terms: dict[str, Loss] = {}
        total = lengths.new_zeros(())
        if self.sequence and logprobs is not None:
            likelihood = _by_sequence(logprobs, owner, count)
            reference = reference.to(likelihood.dtype)
            chosen, rejected = batch.chosen, batch.rejected
            losses = sequence_loss(
                likelihood[chosen], likelihood[rejected], reference[chosen], reference[rejected], self.beta
            )
            margin = (likelihood - reference).detach()
            margin = margin[chosen] - margin[rejected]
            total = total + self.sequence * losses.sum()
            terms["dpo"] = Loss(losses.detach().sum(), pairs)
            terms["margin"] = Loss(margin.sum(), pairs)
            terms["accuracy"] = Loss((margin > 0).to(margin.dtype).sum(), pairs)
        if divergence is not None:
            for name, weight, members in (
                ("positive", self.positive, batch.chosen),
                ("negative", self.negative, batch.rejected),
            ):
                if weight:
                    part = divergence[members].sum()
                    total = total + weight * part
                    terms[name] = Loss(part.detach(), pairs)
            terms |= _of_cache(batch, pairs)
        return Loss(total, pairs, terms)

    def _divergence(
        self,
        policy: Any,
        hidden: Float[Tensor, "n width"],
        targets: Int[Tensor, " n"],
        batch: PairBatch,
        owner: Int[Tensor, " n"],
    ) -> tuple[Float[Tensor, " n"] | None, Float[Tensor, " sequence"]]:
        """Each target's log-probability where L_dpo wants it, and the divergence of each sequence's response.

        That of members whose weight is 0 is not computed and 0.
        """
        count = batch.reference.shape[0]
        needed = torch.zeros(count, dtype=torch.bool, device=owner.device)
        if self.positive:
            needed[batch.chosen] = True
        if self.negative:
            needed[batch.rejected] = True
        kept = needed[owner] if batch.taught is None else needed[owner] & batch.taught
        teacher = self._teach(policy, batch, kept)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "direction": self.direction,
            "vocabulary": self.vocabulary,
        }
        logprobs = None
        if self.sequence and bool(kept.all()):
            logprobs, per_token = scored_kl(hidden, policy.unembedding, targets, teacher, **options)
        else:
            if self.sequence:
                logprobs = token_logprobs(hidden, policy.unembedding, targets)
            per_token = chunked_kl(hidden[kept], policy.unembedding, teacher, **options)
        largest = float(per_token.detach().abs().max())
        if not math.isfinite(largest):
            raise TeacherError(
                f"the divergence from the teacher is {largest} at some of {len(per_token)} tokens: the student or the "
                "teacher gives NaN or infinite logits; look at their weights, the precision and the learning rate"
            )
        if isinstance(teacher, LiveTeacher) and largest < SAME_DISTRIBUTION:
            raise TeacherError(
                f"the teacher's distributions are the student's own at all {len(per_token)} tokens: the distillation "
                "terms would be silently zero. Give another teacher, or weights positive=0, negative=0"
            )
        sums = _by_sequence(per_token, owner[kept], count)
        if self.normalise == "sequence":
            return logprobs, sums
        lengths = _by_sequence(torch.ones_like(per_token), owner[kept], count)
        return logprobs, sums / lengths.clamp(min=1)

    def _teach(self, policy: Any, batch: PairBatch, kept: Bool[Tensor, " n"]) -> LiveTeacher | CachedTeacher:
        """The teacher at the tokens that are asked for, checked."""
        vocabulary = self.vocabulary or policy.unembedding.shape[0]
        if not bool(kept.any()):
            raise TeacherError(
                f"the teacher has nothing to say at any response token of {len(batch.chosen)} pairs: its tokens never "
                "coincide with the student's, so the distillation terms would be silently zero. Use a teacher of the "
                "student's tokenizer"
            )
        if batch.cached is not None:
            cached = batch.cached.at(kept if batch.taught is None else kept[batch.taught])
            _check_cached(cached, vocabulary)
            return cached
        if self.teacher is None:
            raise TeacherError(
                f"DPD has the weights positive={self.positive} and negative={self.negative} but no teacher: give a "
                "live one, batches with a cached one, or both weights as 0"
            )
        sequences = batch.sequences
        with torch.no_grad():
            hidden = sequences.read_by(self.teacher)
            live = LiveTeacher(hidden[sequences.weights > 0][kept], self.teacher.unembedding)
        _check_live(live, policy.unembedding.shape[0], self.vocabulary)
        return live


def _of_cache(batch: PairBatch, pairs: Tensor) -> dict[str, Loss]:
    """What a cached teacher leaves out: the probability it did not store, and the tokens it says nothing of."""
    if batch.cached is None:
        return {}
    tail = batch.cached.tail()
    # of every batch, whole ones too: a step's share is over all its tokens, and all processes add up the same terms
    tokens = len(tail) if batch.taught is None else len(batch.taught)
    return {
        "teacher_tail": Loss(tail.sum(), pairs.new_tensor(len(tail))),
        "taught": Loss(pairs.new_tensor(len(tail)), pairs.new_tensor(tokens)),
    }


def _by_sequence(values: Tensor, owner: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, owner, values)


def _known(reference: Tensor) -> Tensor:
    if bool(reference.isnan().any()):
        raise UserError(
            "a pair has no log-probabilities under the reference: compute them once with the checkpoint that training "
            "starts from, or set sequence=0"
        )
    return reference


def _check_responses(lengths: Tensor, batch: PairBatch) -> None:
    members = torch.cat((batch.chosen, batch.rejected))
    members = members[members >= 0]
    empty = members[lengths[members] == 0].tolist()
    if empty:
        raise UserError(
            f"the sequences {empty[:10]} of a batch of {len(batch.chosen)} pairs have an empty response (no trained "
            "token): drop these pairs"
        )


def _check_live(teacher: LiveTeacher, vocabulary: int, compared: int | None) -> None:
    known = teacher.unembedding.shape[0]
    if known != vocabulary if compared is None else compared > min(known, vocabulary):
        raise TeacherError(
            f"the teacher's vocabulary has {known:,} tokens and the policy's {vocabulary:,}: their distributions "
            "cannot be compared. Distil from a teacher of the same tokenizer; where only the padding of the embeddings "
            "differs, set `vocabulary` to the number of the tokenizer's tokens"
        )
    count = len(teacher.hidden)
    places = torch.linspace(0, count - 1, min(count, POSITIONS_LOOKED_AT)).long().to(teacher.hidden.device)
    logits = teacher.hidden[places].float() @ teacher.unembedding.detach().float().t()
    if not bool(teacher.hidden.isfinite().all()) or not bool(logits.isfinite().all()):
        raise TeacherError("the teacher gives NaN or infinite logits: look at its weights and its precision")
    uniform = bool((logits == logits[:, :1]).all())
    if uniform or (count > 1 and bool((teacher.hidden == teacher.hidden[:1]).all())):
        what = "the same logit to every token" if uniform else "the same distribution everywhere"
        raise TeacherError(f"the teacher is constant, it gives {what}: its weights are not loaded, or not trained")


def _check_cached(teacher: CachedTeacher, vocabulary: int) -> None:
    logprobs, tokens = teacher.logprobs, teacher.tokens
    if bool(logprobs.isnan().any()):
        raise TeacherError("the cached teacher holds NaN: write the cache again")
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise TeacherError(
            f"the cached teacher names token {int(tokens.max()):,}, the policy's vocabulary has {vocabulary:,}: it was "
            "written with another tokenizer"
        )
    same = len(tokens) > 1 and bool((logprobs == logprobs[:1]).all()) and bool((tokens == tokens[:1]).all())
    if same or (logprobs.shape[-1] > 1 and bool((logprobs == logprobs[:, :1]).all())):
        raise TeacherError(
            "the cached teacher is constant: it gives the same distribution everywhere, or a uniform one"
        )
