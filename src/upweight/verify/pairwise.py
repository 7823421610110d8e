r"""Preference rewards: how a completion fares against the others of its group.

    p_ij = sigmoid(r_i - r_j)                      Bradley and Terry 1952: i is preferred to j
    w_i  = mean over j != i of p_ij                the reward, 0-1; the mean over a group is always 1/2

r is the scalar of a reward model. A win rate does not move with the scale of r across problems, and cannot be driven up
by a policy that finds one direction in which r grows without bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.core.batches import PADDING
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.model.heads import ScalarHead
from upweight.text.chat import render, reply_tokens
from upweight.text.tokenizer import Tokenizer

Scorer = Callable[[Problem, Sequence[Completion]], list[float]]
"""One finite scalar a completion, higher is better; only differences within a problem mean something."""


def win_probabilities(scores: Sequence[float]) -> list[list[float]]:
    """p[i][j], the probability that completion i is preferred to completion j."""
    return [[_sigmoid(one - other) for other in scores] for one in scores]


def symmetrised(answers: Sequence[Sequence[float]]) -> list[list[float]]:
    """p[i][j] from answers[i][j], the preference for i asked in the order (i, j): (a_ij + 1 - a_ji) / 2.

    A judge that favours the place and not the answer comes out at 1/2.
    """
    count = len(answers)
    return [[(answers[i][j] + 1.0 - answers[j][i]) / 2 for j in range(count)] for i in range(count)]


def win_rates(preferred: Sequence[Sequence[float]], truncated: Sequence[bool] | None = None) -> list[float]:
    """The mean of preferred[i][j] over j != i; 1/2 for a completion without rivals.

    A truncated completion loses to each that is whole, whatever was preferred; two truncated ones draw.
    """
    count = len(preferred)
    cut = [False] * count if truncated is None else truncated
    if count == 1:
        return [0.0 if cut[0] else 0.5]
    rates = []
    for i in range(count):
        wins = [
            (0.5 if cut[i] else 1.0) if cut[j] else 0.0 if cut[i] else preferred[i][j] for j in range(count) if j != i
        ]
        rates.append(math.fsum(wins) / len(wins))
    return rates


def length_bias(rewards: Sequence[float], lengths: Sequence[int]) -> float:
    """Pearson's correlation of rewards and lengths in tokens; 0 where either does not vary.

    Far from 0, a preference reward pays for length. Compare within problems: pool the differences from group means.
    """
    if len(rewards) != len(lengths):
        raise ValueError(f"{len(rewards)} rewards for {len(lengths)} lengths: expected one each")
    return correlation(rewards, [float(length) for length in lengths])


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; 0 where either does not vary."""
    if not first:
        return 0.0
    first_mean, second_mean = math.fsum(first) / len(first), math.fsum(second) / len(second)
    up = [value - first_mean for value in first]
    along = [value - second_mean for value in second]
    scale = math.sqrt(math.fsum(u * u for u in up)) * math.sqrt(math.fsum(a * a for a in along))
    return math.fsum(u * a for u, a in zip(up, along, strict=True)) / scale if scale > 1e-12 else 0.0


@dataclass(frozen=True)
class PairwiseVerifier(Verifier):
    """The win rate of each completion within its group, by the scalars of `scorer`. A group of one earns 1/2."""

    scorer: Scorer

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        scores = self.scorer(problem, group)
        if len(scores) != len(group):
            raise ValueError(f"problem {problem.id}: the scorer gave {len(scores)} scores for {len(group)} completions")
        wrong = [score for score in scores if not math.isfinite(score)]
        if wrong:
            raise ValueError(f"problem {problem.id}: the scorer gave {wrong[0]}: a reward is a finite number")
        rates = win_rates(win_probabilities(scores), [completion.truncated for completion in group])
        return [
            Verdict(rate, "truncated" if completion.truncated else f"win rate {rate:.3f}, score {score:.3f}")
            for rate, score, completion in zip(rates, scores, group, strict=True)
        ]


@dataclass(frozen=True)
class RewardModelScorer:
    """Scalars of a reward model, read at the last token of prompt and completion.

    Attributes:
        model: the reward model.
        tokenizer: the policy's own, as completions are scored by the tokens that were sampled.
        batch_rows: completions in one forward pass.
    """

    model: ScalarHead
    tokenizer: Tokenizer
    batch_rows: int = 8

    def __call__(self, problem: Problem, completions: Sequence[Completion]) -> list[float]:
        prompt = render(self.tokenizer, problem.messages)
        sequences = [[*prompt, *reply_tokens(self.tokenizer, prompt, one)] for one in completions]
        rewards: list[float] = []
        for start in range(0, len(sequences), self.batch_rows):
            rewards += self._forward(sequences[start : start + self.batch_rows]).tolist()
        return rewards

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, " sequence"]:
        longest = max(map(len, sequences))
        tokens = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
        segments = [
            [row] * len(sequence) + [PADDING] * (longest - len(sequence)) for row, sequence in enumerate(sequences)
        ]
        device = self.model.score.weight.device
        rewards: Tensor = self.model(torch.tensor(tokens, device=device), None, torch.tensor(segments, device=device))
        return rewards


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    small = math.exp(x)
    return small / (1.0 + small)
