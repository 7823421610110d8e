"""The model that a person names, as a Sampler: a checkpoint of any origin, a name on the hub, or an endpoint.

runs/quickstart/sft          a directory; RECIPE and RECIPE:STEP as everywhere
Qwen/Qwen3-0.6B              a name on the Hugging Face hub
http://host:8000/v1          an OpenAI-compatible endpoint that serves one model
http://host:8000/v1#NAME     one of several that it serves; the key is taken from OPENAI_API_KEY
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.protocols import Sampler
from upweight.core.work import Machine
from upweight.model.precision import Precision, usual_precision
from upweight.rollout.local import open_local
from upweight.rollout.remote import RemoteSampler

ENDPOINT = re.compile(r"https?://")
IN_FLIGHT = 32
REMOTE_ROWS = 96
"""Completions asked for at once of an endpoint: fewer than `upweight serve` takes before it says that it is busy."""
LOCAL_ROWS = 64
"""Completions that are begun together on this machine; what is done is kept after as many."""


@dataclass(frozen=True)
class Opened:
    """A model to sample from.

    Attributes:
        identity: what its answers depend on besides the prompt and the limits.
        rows: completions to ask for at once.
    """

    sampler: Sampler
    identity: Mapping[str, object]
    rows: int


def check_model(given: str, root: Path) -> None:
    """Raises UserError where `given` names nothing, before anything is loaded. A name on the hub is fetched here."""
    if not ENDPOINT.match(given):
        find_model(given, root)


@contextmanager
def open_sampler(given: str, *, root: Path, machine: Machine, dtype: Precision | None = None) -> Iterator[Opened]:
    """A sampler of the model that `given` names; a local one's memory is free again afterwards.

    Its weights are held in `dtype`; None takes what is usual on the machine's device.
    """
    if ENDPOINT.match(given):
        url, _, name = given.partition("#")
        model, weights = _served(url, name)
        remote = RemoteSampler(url, model, most_in_flight=IN_FLIGHT)
        yield Opened(remote, {"endpoint": url.rstrip("/"), "model": model, "weights": weights}, REMOTE_ROWS)
        return
    directory = find_model(given, root)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    sampler = open_local(directory, device=machine.device, dtype=dtype or usual_precision(machine.device), fits=True)
    tokenizer = sampler.tokenizer
    identity = {
        "weights": sampler.policy,
        "config": json.loads((directory / "config.json").read_text()),
        "tokenizer": tokenizer.fingerprint,
        "special_tokens": tokenizer.special_tokens,
        "ends": sorted(tokenizer.stop_tokens),
        "template": tokenizer.chat_template,
    }
    yield Opened(sampler, identity, LOCAL_ROWS)


def _served(url: str, asked: str) -> tuple[str, str]:
    """The name of the model that an endpoint serves, and what tells its weights from others of that name, where the
    endpoint says so (`upweight serve` does).

    Raises UserError where no name is `asked` for and it serves several, or does not answer.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(f"{url.rstrip('/')}/models", headers=headers, timeout=30.0)
        reply.raise_for_status()
        found = {str(model["id"]): str(model.get("fingerprint", "")) for model in reply.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        if asked:  # a service need not list its models
            return asked, ""
        raise UserError(
            f"{url} does not say which models it serves ({type(error).__name__}: {error}): check that the server runs "
            f"and that the address ends in /v1, or name the model, {url}#NAME"
        ) from error
    if asked:
        return asked, found.get(asked, "")
    if len(found) != 1:
        raise UserError(f"{url} serves {len(found)} models ({', '.join([*found][:8])}): name one, {url}#NAME")
    return next(iter(found.items()))
