"""GRPO without a KL term: clipped policy gradient with advantages relative to the group.

    A_i = r_i - mean(r)        over the completions of one problem   (divided by their standard deviation if asked for)
    rho_t = p(y_t) / p_sampled(y_t)
    L = sum_t -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A),     weight = tokens

Sums go over the completion tokens of all completions that ended by themselves. A truncated completion is in neither the
total nor the weight nor any figure; only its reward enters its group's mean, unless that too is turned off.

A completion whose advantage is 0, because its group agrees, counts in the weight and adds nothing to the total whatever
its ratio is. So it is not read at all: late in a stage that is most of them.

Shao et al., arXiv 2402.03300 (groups); Yu et al., arXiv 2503.14476 (token-level sum, two clip bounds); Liu et al.,
arXiv 2503.20783 (no division by the spread, nor by the length, both of which bias); arXiv 2512.06266, section 5 (no KL,
truncated completions masked).

log p is taken under the distribution that was sampled from: temperature and truncation of the vocabulary included. On
the first update after sampling, policy and sampler are the same weights, so the largest difference of their
log-probabilities measures the two implementations against each other; above `mismatch_bound` the step is refused.

Where sampler and policy differ knowingly (stale weights, a quantised or rounded sampler), `off_policy="truncate"`
weighs each token by its truncated importance ratio, which is a constant for the gradient:

    L = sum_t -min(rho_t, truncation) A log p(y_t)

so that no token is lost to the clip and none counts more than `truncation` times (Espeholt et al., arXiv 1802.01561,
equation 1; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.core.batches import Loss, TokenBatch
from upweight.core.errors import Refusal, UserError
from upweight.core.packing import Continuation, best_fit, bundles, pack_bundles, places_of
from upweight.core.protocols import Objective
from upweight.core.records import Completion
from upweight.model.logprobs import token_logprobs

Sampled = (
    tuple[Sequence[int], Completion, float | Tensor] | tuple[Sequence[int], Completion, float | Tensor, Sequence[bool]]
)
"""A prompt's tokens, a completion of it, and its advantage; in an episode with tools also which of the completion's
tokens the policy wrote. The others (what a tool returned) are read and never trained on."""


class Idle(NamedTuple):
    """Completions whose advantage is 0 and which are not read.

    Attributes:
        completions, tokens: how many, of those that count.
        nll: the negative log-probability of these tokens as they were sampled, in nats.
    """

    completions: int = 0
    tokens: int = 0
    nll: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Completions with their prompts, packed. A prompt that several of them share is read once.

    Attributes:
        sequences: loss weights mark the completion tokens.
        advantages: of each sequence; 0 for a shared prompt, which is a sequence of its own.
        logprobs: of each target as it was sampled, in nats; 0 where the target was not sampled.
        truncated: sequences that the length limit cut off.
        fresh: whether the policy has not been updated since it sampled these.
        idle: what counts in the weight besides, and is not read.
    """

    sequences: TokenBatch
    advantages: Float[Tensor, " sequence"]
    logprobs: Float[Tensor, "row time"]
    truncated: Bool[Tensor, " sequence"]
    fresh: bool = True
    idle: Idle = field(default_factory=Idle)

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        return self.sequences.token_count

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """The same batch on another device."""
        return RolloutBatch(
            self.sequences.to(device),
            self.advantages.to(device),
            self.logprobs.to(device),
            self.truncated.to(device),
            self.fresh,
            self.idle,
        )


def group_advantages(
    rewards: Sequence[float] | Float[Tensor, " group"],
    *,
    truncated: Sequence[bool] | Bool[Tensor, " group"] | None = None,
    truncated_in_baseline: bool = True,
    divide_by_spread: bool = False,
) -> Float[Tensor, " group"]:
    """The advantage of each completion of one problem: its reward less the group's mean.

    Args:
        truncated: completions that were cut off; they get an advantage of 0, since they are not trained on.
        truncated_in_baseline: whether their rewards enter the mean. True: a problem on which most completions never
            ended is a hard one, and the few that ended well deserve credit for that.
        divide_by_spread: divide by the standard deviation of the rewards in the baseline (of the population). Off: it
            weighs problems up on which nearly all completions agree.

    Raises UserError where a reward is not finite.
    """
    values = rewards.float() if isinstance(rewards, Tensor) else torch.tensor(rewards, dtype=torch.float32)
    if not bool(values.isfinite().all()):
        raise UserError(f"the rewards {values.tolist()} of a group are not all finite: look at the verifier")
    cut = torch.zeros_like(values, dtype=torch.bool) if truncated is None else torch.as_tensor(truncated)
    counted = values if truncated_in_baseline else values[~cut]
    if counted.numel() == 0 or bool(counted.min() == counted.max()):
        return torch.zeros_like(values)  # exactly: the mean of equal rewards may differ from them by rounding
    advantages = values - counted.mean()
    if divide_by_spread:
        spread = counted.std(correction=0)
        # rewards that differ by rounding alone must not be blown up
        advantages = advantages / spread if float(spread) > 1e-6 else torch.zeros_like(values)
    return advantages.masked_fill(cut.to(values.device), 0.0)


@dataclass(frozen=True, slots=True)
class Grpo(Objective):
    """Attributes:
    clip_low, clip_high: how far the ratio may fall below and rise above 1 before its gradient stops. The higher upper
        bound lets unlikely tokens grow.
    normalise: "token" weighs every token alike; "sequence" every completion alike, by its mean over tokens, and of an
        episode that stands in several sequences each of them.
    temperature, top_p, top_k, min_p: of the distribution that was sampled from.
    mismatch_bound: nats; a larger difference between the sampler's log-probability of a token and the policy's own on
        fresh rollouts refuses the step. float32 stays below 1e-3; bfloat16 needs a larger bound.
    off_policy: "clip" is the loss above; "truncate" the one for samplers that differ, in which nothing is clipped.
    truncation: the largest weight of a token under "truncate".
    mask_truncated: False trains on completions that the length limit cut off like on any other, so that running on
        costs reward. The report masks them; this is for comparison.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    normalise: Literal["token", "sequence"] = "token"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    mismatch_bound: float = 0.1
    off_policy: Literal["clip", "truncate"] = "clip"
    truncation: float = 2.0
    mask_truncated: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.mismatch_bound <= 0:
            raise UserError(
                f"clip_low {self.clip_low}, clip_high {self.clip_high}, mismatch_bound {self.mismatch_bound}: expected "
                "clip_low in (0, 1) and the others above 0"
            )
        if self.normalise not in ("token", "sequence"):
            raise UserError(f"normalise is {self.normalise!r}: expected 'token' or 'sequence'")
        if self.off_policy not in ("clip", "truncate") or self.truncation < 1:
            raise UserError(
                f"off_policy {self.off_policy!r}, truncation {self.truncation}: expected 'clip' or 'truncate', and at "
                "least 1, since on-policy tokens weigh 1"
            )

    def __call__(self, policy: Any, batch: RolloutBatch) -> Loss:
        """The clipped loss summed over completion tokens; the weight is the number of tokens (or of completions).

        Logged as means over all tokens: `clip_share` (tokens whose gradient the clip stops, or whose weight is
        truncated) and `sampled_nll` (nats a token, an estimate of the entropy). Over those that have an advantage:
        `ratio` and `sampler_kl` (nats a token, an estimate of KL(sampler || policy), arXiv 2402.03300 equation 4) as
        means, `logprob_difference` and `largest_ratio` as the largest.
        """
        sequences, idle = batch.sequences, batch.idle
        of_sequence = sequences.segments.clamp(min=0)
        counted = (sequences.weights > 0) & ~batch.truncated[of_sequence]
        trained = counted & (batch.advantages[of_sequence] != 0)
        owner = sequences.segments[trained]
        hidden = sequences.read_by(policy)[trained]
        logprobs = token_logprobs(
            hidden,
            policy.unembedding,
            sequences.targets[trained],
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )
        sampled, advantage = batch.logprobs[trained], batch.advantages[owner]
        difference = logprobs - sampled
        largest = difference.detach().abs().max() if difference.numel() else difference.new_zeros(())
        if batch.fresh and not float(largest) <= self.mismatch_bound:
            raise Refusal(_mismatch(float(largest), self.mismatch_bound))
        ratio = difference.exp()
        if self.off_policy == "truncate":
            held = ratio.detach()
            per_token = -held.clamp(max=self.truncation) * advantage * logprobs
            stopped = held > self.truncation
        else:
            clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
            per_token = -torch.minimum(ratio * advantage, clipped * advantage)
            stopped = (ratio * advantage > clipped * advantage).detach()
        read = per_token.new_tensor(per_token.numel())
        tokens = counted.sum().to(read.dtype) + idle.tokens
        total, weight = per_token.sum(), tokens
        if self.normalise == "sequence":
            lengths = read.new_zeros(len(batch.truncated)).index_add(0, owner, torch.ones_like(per_token))
            total = (per_token / lengths[owner]).sum()
            weight = read.new_tensor(len(sequences.segments[counted].unique()) + idle.completions)
        terms = {
            "ratio": Loss(ratio.detach().sum(), read),
            "clip_share": Loss(stopped.to(read.dtype).sum(), tokens),
            "sampled_nll": Loss(idle.nll - batch.logprobs[counted].sum(), tokens),
            "sampler_kl": Loss((ratio - 1 - difference).detach().sum(), read),
        }
        highest = ratio.detach().max() if ratio.numel() else largest
        return Loss(total, weight, terms, {"logprob_difference": largest, "largest_ratio": highest})

    def batches(
        self, completions: Sequence[Sampled], *, row_tokens: int, fresh: bool = True, share_prompts: bool = True
    ) -> list[RolloutBatch]:
        """Completions as packed microbatches of about `row_tokens` tokens each.

        Truncated ones are left out, unless `mask_truncated` is off, and so are those that an error of the sampler's
        cut off; those whose advantage is 0 are only counted.

        Args:
            share_prompts: read a prompt once for the completions of it that follow each other and fit a microbatch;
                the same loss and gradient, up to rounding. For policies that take `prefixes`.

        Never empty: where all are truncated one batch of weight 0 comes back, and the trainer skips the step. Where no
        advantage differs from 0, one comes back that reads nothing.
        """
        for completion in (item[1] for item in completions):
            if completion.text and not completion.tokens:
                raise UserError(
                    f"a completion by {completion.policy!r} has a text and no tokens: GRPO trains on those that were "
                    'sampled; use a sampler that reports them (of vLLM, extra={"return_token_ids": True})'
                )
        whole = [item for item in completions if item[1].tokens and self._counts(item[1])]
        for completion in (item[1] for item in whole):
            if not completion.logprobs:
                raise UserError(
                    f"a completion by {completion.policy!r} has no log-probabilities: GRPO needs those of the "
                    "distribution that was sampled from; use a sampler that reports them"
                )
        idle = _idle([item for item in whole if float(item[2]) == 0])
        whole = [item for item in whole if float(item[2]) != 0]
        read = [Continuation(item[0], item[1].tokens, _weights(item)) for item in whole]
        shared = bundles(read, row_tokens) if share_prompts else [[index] for index in range(len(read))]
        lengths = [places_of([read[index] for index in bundle]) for bundle in shared]
        groups = best_fit(lengths, max([row_tokens, *lengths])) or [[]]
        batches = [_batch(whole, read, [shared[index] for index in sorted(group)], fresh) for group in groups]
        return [replace(batches[0], idle=idle), *batches[1:]]

    def _counts(self, completion: Completion) -> bool:
        return completion.stop != "error" and not (self.mask_truncated and completion.truncated)


def _weights(item: Sampled) -> list[float]:
    """The loss weight of each of a completion's tokens."""
    return [1.0] * len(item[1].tokens) if len(item) == 3 else [float(wrote) for wrote in item[3]]


def _idle(items: Sequence[Sampled]) -> Idle:
    """What is counted of completions that are not read."""
    sampled = [
        logprob
        for item in items
        for logprob, weight in zip(item[1].logprobs, _weights(item), strict=True)
        if weight > 0
    ]
    return Idle(sum(any(_weights(item)) for item in items), len(sampled), -math.fsum(sampled))


def _batch(
    items: Sequence[Sampled], read: Sequence[Continuation], shared: Sequence[Sequence[int]], fresh: bool
) -> RolloutBatch:
    """One batch of those `items`, as they are `read`, that are named by bundles."""
    sequences, places = pack_bundles([[read[index] for index in bundle] for bundle in shared])
    sampled = [[read[index]._replace(weights=items[index][1].logprobs) for index in bundle] for bundle in shared]
    count = max(1, int(sequences.segments.max()) + 1)
    advantages = torch.zeros(count)
    for place, index in zip(places.tolist(), chain.from_iterable(shared), strict=True):
        advantages[place] = float(items[index][2])
    return RolloutBatch(
        sequences, advantages, pack_bundles(sampled)[0].weights, torch.zeros(count, dtype=torch.bool), fresh
    )


def _mismatch(largest: float, bound: float) -> str:
    return (
        f"the sampler's log-probability of a token and the policy's own differ by {largest:.4f} nats on fresh "
        f"rollouts, more than mismatch_bound {bound}: the gradient would be biased. Sample at the temperature, top_p, "
        "top_k and min_p that the objective is given, with the same weights and precision, or raise the bound knowingly"
    )
