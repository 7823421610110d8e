"""Tensors that a training step consumes, and the loss that it returns.

Axis legend, used in every shape of the package:
    row       rows of a packed batch
    time      token positions within a row
    sequence  whole token sequences (documents, conversations, completions); several share a row when packed
    vocab     token types
    width     model features
    pair      preference pairs
    group     completions of one problem
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

PADDING = -1
"""The segment of positions that hold no token."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum and what to divide it by. Divided once, in the trainer, over all microbatches and processes of a step.

    Attributes:
        total: the summed loss, carrying the gradient.
        weight: how many units (trained tokens, pairs) the sum is over. Zero where nothing is trained.
        terms: named sums to log, divided likewise by their own weights; they carry no gradient.
        maxima: named figures to log, of which a step reports the largest.
    """

    total: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    terms: Mapping[str, "Loss"] = field(default_factory=dict)
    maxima: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Packed rows of token sequences.

    Attributes:
        tokens: what the model reads.
        positions: restart at 0 with each sequence.
        segments: the index of the sequence within the batch, the same number for all its tokens and no others;
            PADDING where there is no token. Attention never crosses segments, but for `prefixes`.
        targets: the token to predict at each place (the next one of the same sequence); any id where weights is 0.
        weights: the loss weight of each target; 0 where it is not trained.
        prefixes: the segment that each token's own segment continues, and may attend to: a prompt that several
            completions share. It stands before them in the same row. A segment's own number where it continues none;
            None where that is so for all.
        one_a_row: known to hold no second sequence in any row. `to` looks before it leaves the host, where that is
            cheap; False says nothing.
    """

    tokens: Int[Tensor, "row time"]
    positions: Int[Tensor, "row time"]
    segments: Int[Tensor, "row time"]
    targets: Int[Tensor, "row time"]
    weights: Float[Tensor, "row time"]
    prefixes: Int[Tensor, "row time"] | None = None
    one_a_row: bool = False

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device."""
        named = ("tokens", "positions", "segments", "targets", "weights", "prefixes")
        held = {name: getattr(self, name) for name in named}
        moved = {name: value.to(device, non_blocking=True) for name, value in held.items() if value is not None}
        alone = self.one_a_row
        if torch.device(device).type != "cpu" and self.segments.device.type == "cpu":
            alone = bool(((self.segments == self.segments[:, :1]) | (self.segments == PADDING)).all())
        return replace(self, **moved, one_a_row=alone)

    @property
    def attended(self) -> Int[Tensor, "row time"] | None:
        """What a model is told of the segments: nothing where causal attention keeps to them by itself.

        Padding stands behind the sequence of its row, so that no token of it looks there.
        """
        return None if self.one_a_row else self.segments

    def read_by(self, model: Callable[..., Float[Tensor, "row time width"]]) -> Float[Tensor, "row time width"]:
        """The model's hidden states. One that takes no shared prompts need not know of `prefixes`."""
        shared = {} if self.prefixes is None else {"prefixes": self.prefixes}
        return model(self.tokens, self.positions, self.attended, **shared)

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        return int((self.segments != PADDING).sum())
