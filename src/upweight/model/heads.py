"""A scalar read off a language model's last token: the score of a Bradley-Terry reward model."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upweight.core.batches import PADDING
from upweight.core.errors import UserError
from upweight.model import weights
from upweight.model.transformer import Transformer

HEAD_NAME = "scalar_head.safetensors"


class ScalarHead(nn.Module):
    """A transformer and one linear map of its hidden state at the last token of each sequence.

    Attributes:
        transformer: the body, whose unembedding is not used.
        score: the map; zero at the start, so that training begins without an opinion.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.score = nn.Linear(transformer.config.width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(
        self,
        tokens: Int[Tensor, "row time"],
        positions: Int[Tensor, "row time"] | None = None,
        segments: Int[Tensor, "row time"] | None = None,
    ) -> Float[Tensor, " sequence"]:
        """One score a sequence, in the order of the segment numbers, which are those of core.batches.TokenBatch.

        Without segments each row is one sequence.
        """
        hidden = self.transformer(tokens, positions, segments)
        last = hidden[:, -1] if segments is None else hidden.flatten(0, 1)[_last_tokens(segments)]
        scores: Tensor = self.score(last)[:, 0].float()
        return scores

    def save(self, path: str | Path) -> None:
        """The transformer as a model directory, and the map beside it."""
        weights.save(self.transformer, path)
        file = Path(path) / HEAD_NAME
        temporary = file.with_name(f"{HEAD_NAME}.partial")
        save_file({"score.weight": self.score.weight.detach().cpu().contiguous()}, temporary)
        temporary.replace(file)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "ScalarHead":
        """A reward model that `save` wrote. Raises UserError where the directory has no scalar head."""
        transformer, config = weights.load(path)
        model = cls(transformer)
        file = Path(path) / HEAD_NAME
        try:
            weight = load_file(file)["score.weight"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{file} is missing or damaged ({error}): {path} is no reward model") from error
        if weight.shape != (1, config.width):
            raise UserError(f"{file} is of the width {weight.shape[-1]}, the model beside it of {config.width}")
        model.score.weight.data.copy_(weight)
        return model.to(device)


def _last_tokens(segments: Tensor) -> Tensor:
    """The flat index of the last token of each segment, by segment number."""
    follows = torch.full_like(segments, PADDING)
    follows[:, :-1] = segments[:, 1:]
    ends = ((segments != follows) & (segments != PADDING)).flatten().nonzero()[:, 0]
    return ends[segments.flatten()[ends].argsort()]
