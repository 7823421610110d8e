"""adopt: take a checkpoint from outside into the run, with its tokenizer: a directory, or a name on the hub.

What it writes is a checkpoint like that of any other stage, so it can be what `pretrain` goes on from (input "init"),
what `sft`, `distill` or `reinforce` begin with (input "model"), a teacher, or one more row of an evaluation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from upweight.core.files import OUTSIDE
from upweight.core.work import Estimate, Summary, Work
from upweight.model.config import usual_width
from upweight.model.hub_config import UnsupportedModel
from upweight.model.language_model import fingerprint, load, save
from upweight.model.weights import read_config
from upweight.text.tokenizer import Tokenizer

SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)([MB])(?![A-Za-z])")


@dataclass(frozen=True)
class Config:
    """Attributes:
    source: a directory in Hugging Face format, or a name on the hub such as "Qwen/Qwen3-0.6B".
    template: Jinja chat template that the checkpoint is to carry; None keeps the one that it has.
    """

    source: str = field(metadata=OUTSIDE)
    template: str | None = None


def run(config: Config, work: Work) -> Summary:
    """Write `model/`, weights and tokenizer. Raises UserError where they do not fit each other."""
    tokenizer = Tokenizer.load(config.source)
    model, shape = load(config.source)
    tokenizer.check_fits(shape.vocab_size, config.source)
    if config.template is not None:
        tokenizer = tokenizer.with_template(config.template)
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    return {
        "source": config.source,
        "parameters": shape.parameter_count(),
        "vocabulary": tokenizer.vocab_size,
        "context": shape.max_context,
        "weights": fingerprint(model),
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Reading and writing the weights, in fp32. Of a hub model the size is read from its name: a plan loads nothing."""
    parameters, token_bytes, held_bytes = _size(config.source)
    return Estimate(
        memory_bytes=8 * parameters,
        disk_bytes=4 * parameters,
        parameters=parameters,
        token_bytes=token_bytes,
        held_bytes=held_bytes,
        seconds=2.0,
    )


def _size(source: str) -> tuple[float, float, float]:
    """Parameters, and what training and decoding keep of a token: by the configuration, or as it usually is of such a
    size. A wrapped model holds nothing while it decodes."""
    if (Path(source) / "config.json").exists():
        try:
            shape = read_config(source)
        except UnsupportedModel:  # a wrapped model says its size once it is open
            parameters = sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) / 4
            return parameters, _usual_token_bytes(parameters), 0.0
        held = 4.0 * shape.held_values_per_token()
        return float(shape.parameter_count()), shape.activation_bytes_per_token(), held
    size = SIZE_IN_NAME.search(source)
    parameters = float(size[1]) * {"M": 1e6, "B": 1e9}[size[2]] if size else 0.0
    # of keys and values, a third of the width in each layer: three query heads usually share one of them
    return parameters, _usual_token_bytes(parameters), 4.0 * usual_width(parameters) ** 2 / 20 * 2 / 3


def _usual_token_bytes(parameters: float) -> float:
    """Of layers of 22 vectors of the model's width (see ModelConfig.activation_bytes_per_token), as many as usual."""
    width = usual_width(parameters)
    return 4.0 * width / 20 * 22 * width
