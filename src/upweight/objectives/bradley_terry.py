"""Bradley-Terry: a reward model from preferences.

    L = -log sigmoid(r(x, y+) - r(x, y-)) + centre (r(x, y+) + r(x, y-))^2,     weight = pairs

The second term keeps rewards near zero, since preferences fix them only up to a constant (Eisenstein et al., arXiv
2312.09244); it is off by default.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from upweight.core.batches import Loss, TokenBatch
from upweight.core.protocols import Objective


@dataclass(frozen=True, slots=True)
class RankedBatch:
    """Preference pairs whose sequences are packed; `chosen` and `rejected` number the sequences of each pair."""

    sequences: TokenBatch
    chosen: Int[Tensor, " pair"]
    rejected: Int[Tensor, " pair"]

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        return self.sequences.token_count

    def to(self, device: torch.device | str) -> "RankedBatch":
        """The same batch on another device."""
        return RankedBatch(self.sequences.to(device), self.chosen.to(device), self.rejected.to(device))


@dataclass(frozen=True, slots=True)
class BradleyTerry(Objective):
    """Attributes:
    centre: the weight of the squared sum of a pair's rewards.
    """

    centre: float = 0.0

    def __call__(self, policy: Any, batch: RankedBatch) -> Loss:
        """The summed loss of the pairs. `policy` gives one score a sequence (model/heads.ScalarHead).

        Logged: `accuracy`, the share of pairs that are ranked right (a tie counts half), and `reward_margin`.
        """
        sequences = batch.sequences
        scores = policy(sequences.tokens, sequences.positions, sequences.segments)
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]
        margin = chosen - rejected
        total = -logsigmoid(margin).sum()
        if self.centre:
            total = total + self.centre * (chosen + rejected).square().sum()
        pairs = margin.new_tensor(len(margin))
        right = torch.heaviside(margin.detach(), margin.new_tensor(0.5)).sum()
        return Loss(total, pairs, {"accuracy": Loss(right, pairs), "reward_margin": Loss(margin.detach().sum(), pairs)})
