"""Tag scores: the annotator's 0-9 scores of each dimension, distilled into a model with one softmax a dimension.

    L = sum_{document, dimension} -log p(score),     weight = scores that were given

Cross-entropy over ten classes rather than a regression: an annotator's scores pile up at both ends, and the expected
value of the softmax is a calibrated score all the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from upweight.core.batches import Loss
from upweight.core.protocols import Objective

UNSCORED = -1
"""The label of a dimension that the annotator left out."""


@dataclass(frozen=True, slots=True)
class TagBatch:
    """Documents as features or as token ids, and the scores to learn; UNSCORED where there is none."""

    features: Float[Tensor, "document feature"] | Int[Tensor, "document token"]
    scores: Int[Tensor, "document dimension"]

    @property
    def token_count(self) -> int:
        """Documents: features have no tokens."""
        return int(self.features.shape[0])

    def to(self, device: torch.device | str) -> "TagBatch":
        """The same batch on another device."""
        return TagBatch(self.features.to(device), self.scores.to(device))


@dataclass(frozen=True, slots=True)
class TagScores(Objective):
    """`policy` turns features into logits [document dimension score]."""

    def __call__(self, policy: Any, batch: TagBatch) -> Loss:
        """The summed cross-entropy. Logged: `error`, how far the expected score is from the label on average."""
        logits = policy(batch.features)
        given = batch.scores != UNSCORED
        labels = batch.scores[given]
        kept = logits[given]
        expected = kept.detach().softmax(-1) @ torch.arange(kept.shape[-1], dtype=kept.dtype, device=kept.device)
        weight = kept.new_tensor(labels.numel())
        total = cross_entropy(kept, labels, reduction="sum")
        return Loss(total, weight, {"error": Loss((expected - labels).abs().sum(), weight)})
