"""Who plays a part, said in plain values, so that a recipe can name it: a model of the run, an endpoint, an expert.

A part is a Sampler of plain values (the rule-based expert, one of one's own), or a description that `cast` turns into
one: a checkpoint among the step's inputs, or a server that speaks the OpenAI protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.protocols import Sampler
from upweight.core.work import Machine
from upweight.model.language_model import fingerprint, load
from upweight.rollout.local import LocalSampler
from upweight.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model of this run: the input of that name, an artifact with a model/ directory."""

    input: str = "model"
    batch_rows: int = 256


Part = Checkpoint | Sampler


def cast(part: Part, inputs: Mapping[str, Path], machine: Machine) -> Sampler:
    """The sampler that plays `part`. Raises UserError where it names an input that the step does not have."""
    if isinstance(part, Sampler):
        return part
    if part.input not in inputs:
        raise UserError(
            f"a part is given to the checkpoint of the input {part.input!r}, which this step does not have: its inputs "
            f"are {', '.join(inputs) or 'none'}. Add it to the step's inputs"
        )
    source = inputs[part.input] / "model"
    model, _ = load(source, device=machine.device)
    model.eval()
    return LocalSampler(model, Tokenizer.load(source), batch_rows=part.batch_rows, policy=fingerprint(model))
