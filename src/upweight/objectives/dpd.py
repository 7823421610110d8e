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

One forward pass of the policy serves all three terms. A term whose teacher is missing, of another vocabulary, NaN,
constant or the policy itself is an error, never a silent zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from upweight.core.batches import Loss, TokenBatch
from upweight.core.errors import UserError
from upweight.core.packing import pack, strip
from upweight.core.protocols import Objective
from upweight.model.divergence import CachedTeacher, Direction, LiveTeacher, chunked_kl
from upweight.model.logprobs import token_logprobs

Normalise = Literal["token", "sequence"]

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
    """Preference pairs whose sequences (prompt and response) are packed.

    Attributes:
        sequences: loss weights mark the response tokens.
        chosen, rejected: the sequence of each pair's members.
        reference: log-probability of each sequence's response under the reference, in nats; nan where not computed.
        cached: a stored teacher at every response token, in the order of the batch; None where the teacher is live.
    """

    sequences: TokenBatch
    chosen: Int[Tensor, " pair"]
    rejected: Int[Tensor, " pair"]
    reference: Float[Tensor, " sequence"]
    cached: CachedTeacher | None = None

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        return self.sequences.token_count

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on another device."""
        cached = self.cached and replace(
            self.cached, tokens=self.cached.tokens.to(device), logprobs=self.cached.logprobs.to(device)
        )
        return PairBatch(
            self.sequences.to(device),
            self.chosen.to(device),
            self.rejected.to(device),
            self.reference.to(device),
            cached,
        )


def pair_batch(pairs: Sequence[EncodedPair], row_tokens: int) -> PairBatch:
    """The pairs as one packed batch: sequence 2 i is pair i's chosen member, 2 i + 1 its rejected one.

    Args:
        row_tokens: places of a row; rows are longer where a member is.
    """
    if not pairs:
        raise UserError("a batch of no pairs: there is nothing to prefer")
    strips, reference = [], []
    for pair in pairs:
        for response, known in ((pair.chosen, pair.reference_chosen), (pair.rejected, pair.reference_rejected)):
            trained = [False] * len(pair.prompt) + [True] * len(response)
            strips.append(strip((*pair.prompt, *response), trained))
            reference.append(known)
    numbers = torch.arange(len(pairs))
    return PairBatch(pack(strips, row_tokens), 2 * numbers, 2 * numbers + 1, torch.tensor(reference))


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
    """

    teacher: Any = field(default=None, repr=False, compare=False)
    beta: float = 0.1
    sequence: float = 1.0
    positive: float = 1.0
    negative: float = 1.0
    direction: Direction = "forward"
    temperature: float = 1.0
    normalise: Normalise = "token"

    def __post_init__(self) -> None:
        weights = (self.sequence, self.positive, self.negative)
        if min(weights) < 0 or max(weights) == 0:
            raise UserError(f"DPD with the weights {weights}: none may be below 0, and one has to be above")
        if self.beta <= 0 or self.temperature <= 0:
            raise UserError(f"DPD with beta {self.beta} and temperature {self.temperature}: both must be above 0")

    def identity(self) -> dict[str, Any]:
        """The settings, as plain JSON."""
        names = ("beta", "sequence", "positive", "negative", "direction", "temperature", "normalise")
        return {name: getattr(self, name) for name in names}

    def __call__(self, policy: Any, batch: PairBatch) -> Loss:
        """The joint loss summed over the pairs; the weight is the number of pairs.

        Logged: `dpo`, `positive` and `negative` (before their weights), `margin` in nats and `accuracy`, the share of
        pairs whose margin is above 0.
        """
        sequences = batch.sequences
        trained = sequences.weights > 0
        owner = sequences.segments[trained]
        count = batch.reference.shape[0]
        lengths = _by_sequence(torch.ones_like(owner, dtype=torch.float32), owner, count)
        _check_responses(lengths, batch)
        hidden = policy(sequences.tokens, sequences.positions, sequences.attended)[trained]
        pairs = lengths.new_tensor(len(batch.chosen))
        terms: dict[str, Loss] = {}
        total = lengths.new_zeros(())
        if self.sequence:
            logprobs = token_logprobs(hidden, policy.unembedding, sequences.targets[trained])
            likelihood = _by_sequence(logprobs, owner, count)
            reference = _known(batch.reference)
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
        if self.positive or self.negative:
            divergence = self._divergence(policy, hidden, batch, trained, owner, count, lengths)
            for name, weight, members in (
                ("positive", self.positive, batch.chosen),
                ("negative", self.negative, batch.rejected),
            ):
                if weight:
                    part = divergence[members].sum()
                    total = total + weight * part
                    terms[name] = Loss(part.detach(), pairs)
        return Loss(total, pairs, terms)

    def _divergence(
        self,
        policy: Any,
        hidden: Float[Tensor, "n width"],
        batch: PairBatch,
        trained: Bool[Tensor, "row time"],
        owner: Int[Tensor, " n"],
        count: int,
        lengths: Float[Tensor, " sequence"],
    ) -> Float[Tensor, " sequence"]:
        """The divergence of each sequence's response; that of members whose weight is 0 is not computed and 0."""
        needed = torch.zeros(count, dtype=torch.bool, device=owner.device)
        if self.positive:
            needed[batch.chosen] = True
        if self.negative:
            needed[batch.rejected] = True
        kept = needed[owner]
        teacher = self._teach(policy, batch, trained, kept)
        options: dict[str, Any] = {"temperature": self.temperature, "direction": self.direction}
        per_token = chunked_kl(hidden[kept], policy.unembedding, teacher, **options)
        if isinstance(teacher, LiveTeacher) and float(per_token.detach().abs().max()) < SAME_DISTRIBUTION:
            raise TeacherError(
                f"the teacher's distributions are the student's own at all {len(per_token)} tokens: the distillation "
                "terms would be silently zero. Give another teacher, or weights positive=0, negative=0"
            )
        sums = _by_sequence(per_token, owner[kept], count)
        return sums / lengths if self.normalise == "token" else sums

    def _teach(
        self, policy: Any, batch: PairBatch, trained: Bool[Tensor, "row time"], kept: Bool[Tensor, " n"]
    ) -> LiveTeacher | CachedTeacher:
        """The teacher at the tokens that are asked for, checked."""
        vocabulary = policy.unembedding.shape[0]
        if batch.cached is not None:
            cached = replace(batch.cached, tokens=batch.cached.tokens[kept], logprobs=batch.cached.logprobs[kept])
            _check_cached(cached, vocabulary)
            return cached
        if self.teacher is None:
            raise TeacherError(
                f"DPD has the weights positive={self.positive} and negative={self.negative} but no teacher: give a "
                "live one, batches with a cached one, or both weights as 0"
            )
        sequences = batch.sequences
        with torch.no_grad():
            hidden = self.teacher(sequences.tokens, sequences.positions, sequences.attended)
            live = LiveTeacher(hidden[trained][kept], self.teacher.unembedding)
        _check_live(live, vocabulary)
        return live


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
    empty = (lengths == 0).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(
            f"the sequences {empty[:10]} of a batch of {len(batch.chosen)} pairs have an empty response (no trained "
            "token): drop these pairs"
        )


def _check_live(teacher: LiveTeacher, vocabulary: int) -> None:
    if teacher.unembedding.shape[0] != vocabulary:
        raise TeacherError(
            f"the teacher's vocabulary has {teacher.unembedding.shape[0]:,} tokens and the policy's {vocabulary:,}: "
            "their distributions cannot be compared. Distil from a teacher of the same tokenizer"
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
