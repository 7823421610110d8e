"""Who plays a part, said in plain values, so that a recipe can name it: a model of the run, an endpoint, an expert.

A part is a Sampler of plain values (the rule-based expert, one of one's own), or a description that `cast` turns into
one: a checkpoint among the step's inputs, or a server that speaks the OpenAI protocol.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.protocols import Sampler
from upweight.core.work import Machine
from upweight.model.precision import Precision
from upweight.rollout.local import open_local
from upweight.rollout.remote import RemoteSampler


@dataclass(frozen=True)
class Checkpoint:
    """A model of this run: the input of that name, an artifact with a model/ directory.

    Attributes:
        batch_rows: completions decoded at once.
        dtype: what the weights are held in: "bfloat16" is what GPUs are made for.
    """

    input: str = "model"
    batch_rows: int = 256
    dtype: Precision = "float32"


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, `upweight serve`, a service.

    Attributes:
        url: up to and with "/v1".
        model: the name that the server knows it by.
        key_variable: the environment variable that holds the key; a server without keys needs none.
        timeout_seconds, attempts, most_in_flight: of the requests, see rollout/remote.py.
        extra: further fields of each request, for a server's own options, as JSON text.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 600.0
    attempts: int = 5
    most_in_flight: int = 32
    extra: str = ""

    def open(self) -> RemoteSampler:
        """The sampler that asks it. Raises UserError where `extra` is no JSON object."""
        try:
            extra = json.loads(self.extra or "{}")
            if not isinstance(extra, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise UserError(
                f"the endpoint {self.url}: extra is {self.extra!r}, expected a JSON object ({error})"
            ) from None
        return RemoteSampler(
            self.url,
            self.model,
            key_variable=self.key_variable,
            timeout_seconds=self.timeout_seconds,
            attempts=self.attempts,
            most_in_flight=self.most_in_flight,
            extra=extra,
        )


Part = Checkpoint | Endpoint | Sampler


def cast(part: Part, inputs: Mapping[str, Path], machine: Machine) -> Sampler:
    """The sampler that plays `part`. Raises UserError where it names an input that the step does not have."""
    if isinstance(part, Sampler):
        return part
    if isinstance(part, Endpoint):
        return part.open()
    if part.input not in inputs:
        raise UserError(
            f"a part is given to the checkpoint of the input {part.input!r}, which this step does not have: its inputs "
            f"are {', '.join(inputs) or 'none'}. Add it to the step's inputs"
        )
    source = inputs[part.input] / "model"
    return open_local(source, device=machine.device, dtype=part.dtype, batch_rows=part.batch_rows)
