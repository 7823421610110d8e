"""Any checkpoint as a model to train and sample: the Llama family by model/transformer.py, all others wrapped.

The one place that stages, samplers and the command line open models through, so that none of them has to ask which of
the two it holds.
"""

from pathlib import Path

import torch

from upweight.core.errors import UserError
from upweight.model import weights
from upweight.model.config import ModelConfig
from upweight.model.foreign import ForeignConfig, ForeignModel, load_foreign
from upweight.model.hub_config import UnsupportedModel
from upweight.model.transformer import Transformer
from upweight.model.weights import fingerprint

__all__ = ["LanguageModel", "fingerprint", "interpolate", "load", "save"]

LanguageModel = Transformer | ForeignModel


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, ModelConfig | ForeignConfig]:
    """The model of a directory in Hugging Face format, or of a name on the hub ("owner/name").

    Raises UserError, naming what is wrong, where the directory is incomplete or damaged, where transformers has no
    class for the architecture, and where a wrapped model would not keep the contract (model/foreign.py).
    """
    try:
        return weights.load(path, dtype=dtype, device=device)
    except UnsupportedModel:
        model = load_foreign(path, dtype=dtype, device=device)
        return model, model.config


def save(model: LanguageModel, path: str | Path) -> None:
    """Write config.json and safetensors that transformers opens; the tokenizer is saved beside them by text/."""
    if isinstance(model, ForeignModel):
        model.save(path)
    else:
        weights.save(model, path)


@torch.no_grad()
def interpolate(model: LanguageModel, start: LanguageModel, share: float) -> None:
    """Move the weights of `model`, in place, to `start + share (model - start)`.

    Raises UserError where the two are not the same architecture.
    """
    first = dict(start.named_parameters())
    last = dict(model.named_parameters())
    shapes = [{name: weights.shape for name, weights in found.items()} for found in (first, last)]
    if shapes[0] != shapes[1]:
        raise UserError("weights can be interpolated between two checkpoints of one architecture only: these differ")
    for name, weight in last.items():
        weight.copy_(torch.lerp(first[name].to(weight), weight, share))
