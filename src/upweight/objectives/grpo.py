"""GRPO without a KL term: clipped policy gradient with advantages relative to the group.

    A_i = r_i - mean(r)        over the completions of one problem   (divided by their standard deviation if asked for)
    rho_t = p(y_t) / p_sampled(y_t)
    L = sum_t -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A),     weight = tokens

Sums go over the completion tokens of all completions that ended by themselves. A truncated completion is in neither the
total nor the weight nor any figure; only its reward enters its group's mean, unless that too is turned off.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.core.batches import Loss, TokenBatch
from upweight.core.errors import Refusal, UserError
from upweight.core.packing import Strip, best_fit, branches, lay, strip
from upweight.core.protocols import Objective
from upweight.core.records import Completion
from upweight.model.logprobs import token_logprobs

Sampled = (
    tuple[Sequence[int], Completion, float | Tensor] | tuple[Sequence[int], Completion, float | Tensor, Sequence[bool]]
)
"""A prompt's tokens, a completion of it, and its advantage; in an episode with tools also which of the completion's
tokens the policy wrote. The others (what a tool returned) are read and never trained on."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Completions with their prompts, packed. A prompt that several of them share is read once.

    Attributes:
        sequences: loss weights mark the completion tokens.
        advantages: of each sequence; 0 for a shared prompt, which is a sequence of its own.
        logprobs: of each target as it was sampled, in nats; 0 where the target was not sampled.
        truncated: sequences that the length limit cut off.
        fresh: whether the policy has not been updated since it sampled these.
    """

    sequences: TokenBatch
    advantages: Float[Tensor, " sequence"]
    logprobs: Float[Tensor, "row time"]
    truncated: Bool[Tensor, " sequence"]
    fresh: bool = True

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
    if counted.numel() == 0:
        return torch.zeros_like(values)
    advantages = values - counted.mean()
    if divide_by_spread:
        spread = counted.std(correction=0)
        # equal rewards leave a rounding residue that must not be blown up
        advantages = advantages / spread if float(spread) > 1e-6 else torch.zeros_like(values)
    return advantages.masked_fill(cut.to(values.device), 0.0)


@dataclass(frozen=True, slots=True)
class Grpo(Objective):
    """Attributes:
    clip_low, clip_high: how far the ratio may fall below and rise above 1 before its gradient stops. The higher upper
        bound lets unlikely tokens grow.
    normalise: "token" weighs every token alike; "sequence" every completion alike, by its mean over tokens.
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
        if self.off_policy not in ("clip", "truncate") or self.truncation < 1:
            raise UserError(
                f"off_policy {self.off_policy!r}, truncation {self.truncation}: expected 'clip' or 'truncate', and at "
                "least 1, since on-policy tokens weigh 1"
            )

    def __call__(self, policy: Any, batch: RolloutBatch) -> Loss:
        """The clipped loss summed over completion tokens; the weight is the number of tokens (or of completions).

        Logged: `ratio`, `clip_share` (tokens whose gradient the clip stops, or whose weight is truncated),
        `sampled_nll` (nats a token, an estimate of the entropy), `sampler_kl` (nats a token, an estimate of
        KL(sampler || policy), arXiv 2402.03300 equation 4) as means over tokens; `logprob_difference` and
        `largest_ratio` as the largest.
        """
        sequences = batch.sequences
        whole = ~batch.truncated[sequences.segments.clamp(min=0)]
        trained = (sequences.weights > 0) & whole
        owner = sequences.segments[trained]
        # what takes no shared prompts need not know of them
        shared = {} if sequences.prefixes is None else {"prefixes": sequences.prefixes}
        hidden = policy(sequences.tokens, sequences.positions, sequences.attended, **shared)[trained]
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
        tokens = per_token.new_tensor(per_token.numel())
        total, weight = per_token.sum(), tokens
        if self.normalise == "sequence":
            lengths = tokens.new_zeros(len(batch.truncated)).index_add(0, owner, torch.ones_like(sampled))
            total, weight = (per_token / lengths[owner]).sum(), (lengths > 0).sum().to(tokens.dtype)
        terms = {
            "ratio": Loss(ratio.detach().sum(), tokens),
            "clip_share": Loss(stopped.to(tokens.dtype).sum(), tokens),
            "sampled_nll": Loss(-sampled.sum(), tokens),
            "sampler_kl": Loss((ratio - 1 - difference).detach().sum(), tokens),
        }
        highest = ratio.detach().max() if ratio.numel() else largest
        return Loss(total, weight, terms, {"logprob_difference": largest, "largest_ratio": highest})

    def batches(
        self, completions: Sequence[Sampled], *, row_tokens: int, fresh: bool = True, share_prompts: bool = True
    ) -> list[RolloutBatch]:
        """Completions as packed microbatches of about `row_tokens` tokens each. Truncated ones are left out, unless
        `mask_truncated` is off.

        Args:
            share_prompts: read a prompt once for the completions of it that follow each other and fit a microbatch;
                the same loss and gradient, up to rounding. For policies that take `prefixes`.

        Never empty: where all are truncated one batch of weight 0 comes back, and the trainer skips the step.
        """
        whole = [item for item in completions if item[1].tokens and not (self.mask_truncated and item[1].truncated)]
        for completion in (item[1] for item in whole):
            if not completion.logprobs:
                raise UserError(
                    f"a completion by {completion.policy!r} has no log-probabilities: GRPO needs those of the "
                    "distribution that was sampled from; use a sampler that reports them"
                )
        bundles = _bundles(whole, row_tokens) if share_prompts else [[item] for item in whole]
        lengths = [_length(bundle) for bundle in bundles]
        groups = best_fit(lengths, max([row_tokens, *lengths])) or [[]]
        return [_batch([bundles[index] for index in sorted(group)], fresh) for group in groups]


def _bundles(items: Sequence[Sampled], row_tokens: int) -> list[list[Sampled]]:
    """Neighbours with one prompt together, as many as fit `row_tokens`."""
    bundles: list[list[Sampled]] = []
    for item in items:
        last = bundles[-1] if bundles else []
        if last and last[0][0] == item[0] and len(item[0]) > 1 and _length([*last, item]) <= row_tokens:
            last.append(item)
        else:
            bundles.append([item])
    return bundles


def _length(bundle: Sequence[Sampled]) -> int:
    """Places that a bundle takes: a lone completion its prompt too, several share the prompt's all but last token."""
    prompt = bundle[0][0]
    if len(bundle) == 1:
        return len(prompt) + len(bundle[0][1].tokens)
    return len(prompt) - 1 + sum(1 + len(item[1].tokens) for item in bundle)


def _weights(item: Sampled) -> list[float]:
    """The loss weight of each of a completion's tokens."""
    return [1.0] * len(item[1].tokens) if len(item) == 3 else [float(wrote) for wrote in item[3]]


def _batch(bundles: Sequence[Sequence[Sampled]], fresh: bool) -> RolloutBatch:
    """One batch. Shared prompts stand in one row, where attention costs no more and no place is padding."""
    strips: list[Strip] = []
    sampled: list[Strip] = []
    advantages: list[float] = []
    follows: dict[int, int] = {}
    for bundle in bundles:
        prompt, first = bundle[0][0], len(strips)
        if len(bundle) == 1:
            completion = bundle[0][1]
            tokens, known = (*prompt, *completion.tokens), [0.0] * len(prompt)
            strips.append(strip(tokens, known + _weights(bundle[0])))
            sampled.append(strip(tokens, known + list(completion.logprobs)))
            advantages.append(float(bundle[0][2]))
            continue
        strips += branches(prompt, [(item[1].tokens, _weights(item)) for item in bundle])
        sampled += branches(prompt, [(item[1].tokens, item[1].logprobs) for item in bundle])
        advantages += [0.0, *(float(item[2]) for item in bundle)]
        follows |= dict.fromkeys(range(first + 1, len(strips)), first)
    lengths = [len(part.tokens) for part in strips]
    rows = [list(range(len(strips)))] if follows else best_fit(lengths, max(lengths, default=1))
    return RolloutBatch(
        lay(strips, rows, follows=follows),
        torch.tensor(advantages or [0.0]),
        lay(sampled, rows, follows=follows).weights,
        torch.zeros(max(1, len(strips)), dtype=torch.bool),
        fresh,
    )


def _mismatch(largest: float, bound: float) -> str:
    return (
        f"the sampler's log-probability of a token and the policy's own differ by {largest:.4f} nats on fresh "
        f"rollouts, more than mismatch_bound {bound}: the gradient would be biased. Sample at the temperature, top_p, "
        "top_k and min_p that the objective is given, with the same weights and precision, or raise the bound knowingly"
    )
