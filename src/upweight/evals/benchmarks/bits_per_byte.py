"""Bits per byte on held-out text: how well a model predicts it, whatever its tokenizer. Lower is better.

    bits per byte = - sum over tokens of log2 p(token | those before it in the window) / bytes of the text

A text longer than the model's context is read in windows one after another. The weights have to be at hand: endpoints
do not tell the probability of a given text. `figures` has the value over all text together; avg@1 is the mean over
texts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Limits, Sampler, Verifier
from upweight.core.records import Completion, Message, Problem, Sample, Verdict
from upweight.evals.rows import DataSet, Row, read_rows
from upweight.evals.setting import Setting
from upweight.model.logprobs import token_logprobs
from upweight.rollout.local import LocalSampler

DATA = DataSet(hub="Salesforce/wikitext", subset="wikitext-2-raw-v1")
WINDOW_TOKENS = 2048


@dataclass(frozen=True)
class BitsVerifier(Verifier):
    """The bits per byte of a text whose log-probabilities the completion holds."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        size = len(problem.messages[-1].content.encode())
        bits = [-math.fsum(completion.logprobs) / math.log(2) for completion in group]
        return [Verdict(value / size, f"{value:.1f} bits, {size} bytes") for value in bits]


@dataclass(frozen=True)
class BitsPerByte(Benchmark):
    """Texts whose tokens are given, not sampled."""

    setting: Setting
    name: str = "bits_per_byte"
    samples: int = 1
    verifier: Verifier = field(default_factory=BitsVerifier)
    lower_is_better: bool = True

    def problems(self) -> Sequence[Problem]:
        """One for each text: a plain text file is one, in rows the field `text` is. Blank ones are left out."""
        data = self.setting.data
        if self.setting.parts:
            raise UserError(f"{self.name} has no part {self.setting.parts[0]!r}: it has none")
        if data is not None and data.suffix in (".txt", ".md"):
            try:
                rows: Sequence[Row] = [{"text": data.read_text()}]
            except OSError as error:
                raise UserError(f"{data} cannot be read: {error}") from error
        else:
            rows = read_rows(data) if isinstance(data, Path) else DATA.rows(self.name, data)
        texts = [row.get("text") for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{data or DATA.hub}: each row of text needs a field `text`")
        found = [
            Problem(f"text-{index}", (Message("user", text),), source="text")
            for index, text in enumerate(texts)
            if isinstance(text, str) and text.strip()
        ]
        if not found:
            raise UserError(f"{data or DATA.hub} holds no text")
        return found

    def ask(self, sampler: Sampler, problems: Sequence[Problem], limits: Limits) -> list[list[Completion]]:
        if not isinstance(sampler, LocalSampler):
            raise UserError(f"{self.name} needs a model's weights: name a checkpoint or a hub name, no endpoint")
        return [[_read(sampler, problem.messages[-1].content)] for problem in problems]

    def figures(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        sizes = [len(sample.question.encode()) for sample in samples]
        bits = math.fsum(sample.score * size for sample, size in zip(samples, sizes, strict=True))
        return {"bits per byte of all": bits / sum(sizes)}


def _read(sampler: LocalSampler, text: str) -> Completion:
    """The text's tokens and the log-probability of each, the first of a window after the end-of-text token."""
    tokenizer, model = sampler.tokenizer, sampler.model
    tokens = tokenizer.encode(text, control=False)
    window = min(WINDOW_TOKENS, model.config.max_context - 1)
    logprobs: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(tokens), window):
            piece = torch.tensor([[tokenizer.end_of_text, *tokens[start : start + window]]], device=model.device)
            hidden = model(piece[:, :-1])
            told = token_logprobs(hidden[0], model.unembedding, piece[0, 1:])
            logprobs += told.double().tolist()
    return Completion(tuple(tokens), tuple(logprobs), "", "end", sampler.policy)


def benchmark(setting: Setting) -> Benchmark:
    return BitsPerByte(setting)
