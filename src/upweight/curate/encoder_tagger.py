"""The transformer tagger: an encoder of transformers with a head for each dimension, beside the n-gram tagger.

    h = for each layer, the embeddings among them, the mean over the tokens of its hidden states, normalised; all joined
    logits[dimension, score] = W h + b,      softmax over the ten scores 0-9
    expected = part * sum over scores of score * p(score) + (1 - part) * expected of the n-gram tagger

The two err on different texts, since the encoder reads meaning and the n-grams see surfaces, and their mean is better
than either. It is for GPUs: on one core an encoder of 22M parameters scores about ten texts a second.

A directory holds all of it: encoder and tokenizer as transformers writes them, the heads, the n-gram tagger, and
figures. It is trained by `upweight tagger train --encoder NAME` (curate/encoder_training.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from upweight.core.errors import UserError
from upweight.core.records import DIMENSION_COUNT, HIGHEST_SCORE
from upweight.curate.tagger import Scorer, Tagger

SCORES = HIGHEST_SCORE + 1
LOGITS = DIMENSION_COUNT * SCORES
PADDING = -1
ABOUT, HEADS, NGRAMS = "tagger.json", "score_heads.safetensors", "ngrams.npz"
TOKENS_AT_ONCE = 16_384


class ScoreHeads(nn.Module):
    """An encoder, and a softmax over the scores 0-9 of each dimension from the means of its layers' hidden states.

    The early layers know how a text looks, the late ones what it means; some dimensions ask for the one, some for the
    other.

    Attributes:
        encoder: any AutoModel that returns the hidden states of its layers.
        score: the heads; zero at the start, so that training begins without an opinion.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.score = nn.Linear((int(encoder.config.num_hidden_layers) + 1) * int(encoder.config.hidden_size), LOGITS)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens: Int[Tensor, "document token"]) -> Float[Tensor, "document dimension score"]:
        """Logits; PADDING stands where a text has no token more."""
        return self.judge(self.look(tokens))

    def look(self, tokens: Int[Tensor, "document token"]) -> Float[Tensor, "document feature"]:
        """The features that the heads see."""
        shown = tokens != PADDING
        read = self.encoder(input_ids=tokens.clamp_min(0), attention_mask=shown.long(), output_hidden_states=True)
        share = (shown / shown.sum(1, keepdim=True).clamp_min(1)).to(read.hidden_states[0].dtype)[:, None]
        means = torch.cat([share @ hidden.masked_fill(~shown[..., None], 0.0) for hidden in read.hidden_states], 1)
        return layer_norm(means.float(), means.shape[-1:]).flatten(1)

    def judge(self, features: Float[Tensor, "document feature"]) -> Float[Tensor, "document dimension score"]:
        """The heads alone."""
        logits: Tensor = self.score(features)
        return logits.float().view(-1, DIMENSION_COUNT, SCORES)


@dataclass(frozen=True, eq=False)
class EncoderTagger(Scorer):
    """Scores texts by an encoder and by the n-gram tagger.

    Attributes:
        model: on the device that it works on.
        tokenizer: of transformers.
        longest: tokens that are read of an excerpt.
        ngrams: the n-gram tagger.
        part: of the encoder in the expected score, 0-1.
    """

    model: ScoreHeads
    tokenizer: Any
    longest: int
    ngrams: Tagger
    part: float
    figures: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "EncoderTagger":
        """The tagger in a directory that `save` wrote. Raises UserError where it is none."""
        try:
            about = json.loads((path / ABOUT).read_text())
            weights = load_file(path / HEADS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is no transformer tagger ({error}): give a directory that "
                "`upweight tagger train --encoder` wrote"
            ) from error
        encoder, tokenizer = opened(str(path))
        model = ScoreHeads(encoder)
        model.score.load_state_dict(weights)
        ngrams = Tagger.load(path / NGRAMS)
        return cls(
            model.to(device).eval(), tokenizer, int(about["longest"]), ngrams, float(about["part"]), about["figures"]
        )

    def save(self, path: Path) -> None:
        """Write it to a directory, which transformers' AutoModel opens as well."""
        path.mkdir(parents=True, exist_ok=True)
        self.model.encoder.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.model.score.state_dict().items()},
            path / HEADS,
        )
        self.ngrams.save(path / NGRAMS)
        about = {"longest": self.longest, "part": self.part, "figures": dict(self.figures)}
        (path / ABOUT).write_text(json.dumps(about, indent=1))

    def expect_of(self, excerpts: Sequence[str]) -> Float64[np.ndarray, "excerpt dimension"]:
        """The expected scores of some excerpts, at least one."""
        encoded = self.part * expected(self.model, token_ids(self.tokenizer, excerpts, self.longest))
        return np.asarray(encoded + (1 - self.part) * self.ngrams.expect_of(excerpts), np.float64)


def opened(name: str) -> tuple[Any, Any]:
    """An encoder and its tokenizer, by hub name or directory, in float32. Raises UserError where there is none."""
    # slow to import, and the default tagger needs neither
    from transformers import AutoModel, AutoTokenizer

    try:
        return AutoModel.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the encoder {name!r} cannot be opened: {' '.join(str(error).split())[:300]}") from error


def token_ids(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """The first so many tokens of each text, with the marks that the encoder expects; one at least."""
    found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    return [ids or [0] for ids in found]


def laid(rows: Sequence[Sequence[int]]) -> Int[Tensor, "document token"]:
    """Token ids side by side, filled up with PADDING."""
    filled = torch.full((len(rows), max(map(len, rows))), PADDING)
    for place, ids in enumerate(rows):
        filled[place, : len(ids)] = torch.tensor(ids)
    return filled


def expected(model: ScoreHeads, rows: Sequence[Sequence[int]]) -> Float64[np.ndarray, "document dimension"]:
    """The expected score of each dimension by the encoder alone."""
    values = torch.arange(SCORES, dtype=torch.float32, device=model.score.weight.device)
    return np.asarray(over_batches(rows, lambda tokens: model(tokens).softmax(-1) @ values, model), np.float64)


def over_batches(
    rows: Sequence[Sequence[int]], do: Callable[[Tensor], Tensor], model: ScoreHeads
) -> Float32[np.ndarray, "document value"]:
    """What `do` makes of token ids, a row a text; texts of like length go together. No gradient is kept."""
    device = model.score.weight.device
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    parts, start = [], 0
    while start < len(order):
        chosen = order[start : start + max(1, TOKENS_AT_ONCE // len(rows[order[start]]))]
        with torch.no_grad():
            parts.append(do(laid([rows[row] for row in chosen]).to(device)).float().cpu().numpy())
        start += len(chosen)
    found = np.empty((len(rows), parts[0].shape[1]), np.float32)
    found[order] = np.concatenate(parts)
    return found


def open_tagger(path: Path | None, device: str = "cpu") -> Scorer:
    """The tagger in a file or, with a transformer, in a directory; without a path the one that the package ships."""
    return EncoderTagger.load(path, device) if path is not None and path.is_dir() else Tagger.load(path)
