"""Next-token prediction: pretraining and supervised fine-tuning.

    L = sum_t w_t (-log p(y_t | y_<t) + zeta (log Z_t)^2),     weight = sum_t w_t

w_t is the loss weight of a target (0 where it is not trained), Z_t the normaliser of the softmax; the second term, with
zeta of about 1e-4, keeps logits from drifting (PaLM, arXiv 2204.02311, section 5).
"""

from dataclasses import dataclass
from typing import Any

from upweight.core.batches import Loss, TokenBatch
from upweight.core.protocols import Objective
from upweight.model.logprobs import token_scores


@dataclass(frozen=True)
class NextToken(Objective):
    """Attributes:
    z_loss: zeta, the weight of the squared log-normaliser; 0 leaves it out.
    """

    z_loss: float = 0.0

    def __call__(self, policy: Any, batch: TokenBatch) -> Loss:
        """The summed negative log-likelihood in nats. Positions of weight 0 are not even scored."""
        hidden = policy(batch.tokens, batch.positions, batch.attended)
        trained = batch.weights > 0
        weights = batch.weights[trained]
        scores = token_scores(hidden[trained], policy.unembedding, batch.targets[trained])
        nll = -(weights * scores.logprobs).sum()
        weight = weights.sum()
        terms = {}
        total = nll
        if self.z_loss:
            penalty = (weights * scores.log_normaliser.square()).sum()
            total = nll + self.z_loss * penalty
            terms = {"nll": Loss(nll.detach(), weight), "squared_log_normaliser": Loss(penalty.detach(), weight)}
        return Loss(total, weight, terms)
