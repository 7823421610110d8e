"""teach: what a teacher says along the responses of pairs, packed on disk, so that distillation runs without it.

At each response token the teacher's likeliest tokens are kept, and the probability of all others together. `distill`
then reads the input "signal" instead of running the input "teacher". What is lost is measured and reported: the
probability that was not kept, and on the first pairs how far the divergence from the student differs from that of the
whole distribution (a sparse divergence is a lower bound, since all other tokens count as one event).

The teacher is a checkpoint, or an endpoint that gives prompt_logprobs (vLLM). A teacher of another tokenizer is
refused, or, with alignment="spans", asked where its tokens stand for the same characters as the student's, over the
tokens that both vocabularies have.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.core.errors import UserError
from upweight.core.packing import pack, strip
from upweight.core.records import Message, Pair
from upweight.core.work import Estimate, Summary, Work
from upweight.model.divergence import LEAST_PROBABILITY, CachedTeacher, LiveTeacher, chunked_kl
from upweight.model.language_model import LanguageModel, fingerprint, load
from upweight.model.logprobs import CHUNK_LOGITS
from upweight.objectives.dpd import TeacherError
from upweight.rollout.remote import PromptToken
from upweight.store.jsonl import read_jsonl
from upweight.store.signal import META, Signal, SignalWriter
from upweight.synthesize.encoded import encode_pair
from upweight.synthesize.roles import Checkpoint, Endpoint
from upweight.text.alignment import coinciding, shared_tokens, spans
from upweight.text.chat import encode_reply, render
from upweight.text.tokenizer import Tokenizer

SIGNAL = "signal"
AT_ONCE = 16
"""Responses that a teacher is asked about at a time."""

MEASURED_PAIRS = 16
"""Pairs on which the error of the truncation is measured."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    teacher: a checkpoint among the step's inputs, or an endpoint that gives prompt_logprobs.
    kept: tokens of each distribution that are stored; the others count as one. 32 are 136 bytes a token, or 200 for a
        vocabulary above 65,536. An endpoint's server has a bound of its own (vLLM: --max-logprobs).
    temperature: that both models' logits will be divided by in distillation; an endpoint gives 1 only.
    alignment: what becomes of a checkpoint of another tokenizer: "none" refuses it, "spans" takes its distributions
        where both tokenizers have a token over the same characters, and compares the tokens that both know.
    block: pairs stored together, and lost at most in a kill.
    """

    teacher: Checkpoint | Endpoint = Checkpoint("teacher")  # noqa: RUF009 - frozen
    kept: int = 32
    temperature: float = 1.0
    alignment: Literal["none", "spans"] = "none"
    block: int = 256

    def __post_init__(self) -> None:
        if self.kept < 1 or self.block < 1 or self.temperature <= 0:
            raise UserError(
                f"kept {self.kept}, block {self.block}, temperature {self.temperature}: at least one token, one pair, "
                "and a temperature above 0"
            )
        if isinstance(self.teacher, Endpoint) and (self.temperature != 1 or self.alignment != "none"):
            raise UserError(
                "an endpoint gives its likeliest tokens at temperature 1, from which no other temperature and no other "
                "tokenizer can be had: use temperature 1 and alignment 'none', or give the teacher's checkpoint"
            )


class Question(NamedTuple):
    """One response that a teacher is asked about: as tokens of the student, and as text."""

    messages: Sequence[Message]
    text: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]


class Distributions(NamedTuple):
    """A teacher along one response; see store/signal.py."""

    tokens: np.ndarray
    logprobs: np.ndarray
    rest: np.ndarray
    places: Sequence[int] | None = None


def _questions(tokenizer: Tokenizer, pair: Pair) -> list[Question]:
    """The chosen and the rejected response of a pair."""
    encoded, messages = encode_pair(tokenizer, pair), pair.problem.messages
    return [
        Question(messages, pair.chosen.text, encoded.prompt, encoded.chosen),
        Question(messages, pair.rejected.text, encoded.prompt, encoded.rejected),
    ]


def run(config: Config, work: Work) -> Summary:
    """Store the teacher along the input "pairs", as the input "model" (the student) reads them, below `signal/`."""
    source = work.inputs["model"] / "model"
    tokenizer = Tokenizer.load(source)
    pairs = read_jsonl(work.inputs["pairs"] / "pairs.jsonl", Pair)
    if not pairs:
        raise UserError(f"{work.inputs['pairs']} holds no pair: there is nothing to ask a teacher about")
    asked = _opened(config, work, tokenizer)
    folder = work.out / SIGNAL
    starts = range(0, len(pairs), config.block)
    parts = {start: folder / f"{start:08d}" for start in starts}
    done = sum(len(pairs[start : start + config.block]) for start in starts if (parts[start] / META).exists())
    with work.monitor.track("teach", total=len(pairs), unit="pairs", done=done) as bar:
        for start in starts:
            if (parts[start] / META).exists():
                continue
            writer = SignalWriter(
                parts[start],
                vocabulary=tokenizer.vocab_size,
                kept=config.kept,
                temperature=config.temperature,
                teacher=asked.name,
            )
            questions = [one for pair in pairs[start : start + config.block] for one in _questions(tokenizer, pair)]
            for first in range(0, len(questions), AT_ONCE):
                some = questions[first : first + AT_ONCE]
                for question, told in zip(some, asked.along(some), strict=True):
                    writer.write(question.prompt, question.response, *told)
                bar.advance(len(some) / 2)
            writer.close()
    for extra in set(folder.iterdir()) - set(parts.values()):
        shutil.rmtree(extra)
    signal = Signal.open(folder)
    if not signal.places:
        raise TeacherError(
            "the teacher's tokens never coincide with the student's: it cannot be aligned. Use a teacher of the "
            "student's tokenizer"
        )
    figures = _figures(signal, tokenizer, pairs)
    error = {} if asked.model is None else _truncation(asked, load(source)[0], tokenizer, pairs, signal)
    if error:
        work.monitor.say(
            f"keeping {config.kept} tokens changes the divergence from the student by {error['mean_error']:.2g} of "
            f"{error['mean_divergence']:.3g} nats a token on average"
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "teacher": asked.name,
        "pairs": len(pairs),
        "responses": signal.responses,
        "places": signal.places,
        "kept": config.kept,
        "temperature": config.temperature,
        "bytes_a_place": round(size / signal.places, 1),
        **figures,
        **({"truncation": error} if error else {"truncation": "not measured: the whole distribution is not known"}),
    }


def _opened(config: Config, work: Work, tokenizer: Tokenizer) -> "_Asked":
    if isinstance(config.teacher, Endpoint):
        return _Remote(config, config.teacher, tokenizer)
    name = config.teacher.input
    if name not in work.inputs:
        raise UserError(f"the teacher is the checkpoint of the input {name!r}, which this step does not have: add it")
    source = work.inputs[name] / "model"
    own = Tokenizer.load(source)
    model = load(source, device=work.machine.device)[0].eval()
    if own.fingerprint == tokenizer.fingerprint:
        return _Local(config, model, tokenizer)
    if config.alignment == "none":
        raise UserError(
            f"the teacher {source} has another tokenizer than the student ({own.vocab_size:,} and "
            f"{tokenizer.vocab_size:,} tokens): its tokens stand for other text, so its distributions cannot be "
            "compared token by token. Use a teacher of the student's tokenizer; or set alignment='spans', which "
            "compares where the tokens of both coincide"
        )
    return _Aligned(config, model, tokenizer, own)


class _Asked(ABC):
    """A teacher that can be asked. `model` is None where only a part of its distributions can be had."""

    name: str
    model: LanguageModel | None = None

    @abstractmethod
    def along(self, questions: Sequence[Question]) -> list[Distributions]:
        """Its distributions along each response."""


class _Local(_Asked):
    """A checkpoint of the student's tokenizer."""

    def __init__(self, config: Config, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.config, self.model, self.name = config, model, fingerprint(model)
        self.vocabulary = tokenizer.vocab_size
        tokenizer.check_fits(model.unembedding.shape[0], "of the teacher")

    def along(self, questions: Sequence[Question]) -> list[Distributions]:
        assert self.model is not None
        matrix = self.model.unembedding[: self.vocabulary].detach()
        made = []
        for hidden in hidden_along(self.model, [(one.prompt, one.response) for one in questions]):
            parts = [
                likeliest((part @ matrix.t()).float() / self.config.temperature, self.config.kept)
                for part in hidden.split(max(1, CHUNK_LOGITS // self.vocabulary))
            ]
            tokens, logprobs, rest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            made.append(Distributions(tokens, logprobs, rest))
        return made


class _Aligned(_Asked):
    """A checkpoint of another tokenizer, asked where its tokens coincide with the student's."""

    def __init__(self, config: Config, model: LanguageModel, tokenizer: Tokenizer, own: Tokenizer) -> None:
        self.config, self.whole, self.name = config, model, f"{fingerprint(model)}, aligned by spans"
        self.tokenizer, self.own = tokenizer, own
        shared = shared_tokens(tokenizer, own)
        self.theirs = torch.tensor(sorted(shared), device=model.device)
        self.mine = torch.tensor([shared[number] for number in sorted(shared)])
        if len(shared) <= config.kept:
            raise TeacherError(
                f"the vocabularies of student and teacher share {len(shared)} tokens, no more than the {config.kept} "
                "to be kept: they cannot be aligned"
            )

    def along(self, questions: Sequence[Question]) -> list[Distributions]:
        prompts = [render(self.own, one.messages) for one in questions]
        read = [encode_reply(self.own, prompt, one.text) for prompt, one in zip(prompts, questions, strict=True)]
        made = []
        for one, tokens, hidden in zip(
            questions, read, hidden_along(self.whole, list(zip(prompts, read, strict=True))), strict=True
        ):
            places = coinciding(spans(self.tokenizer, one.response, one.text), spans(self.own, tokens, one.text))
            logits = (hidden[[place for _, place in places]] @ self.whole.unembedding.detach().t()).float()
            logprobs = (logits / self.config.temperature).log_softmax(-1)[:, self.theirs]
            top = logprobs.topk(self.config.kept, dim=-1)
            rest = (1 - top.values.exp().sum(-1)).clamp(min=LEAST_PROBABILITY).log()
            kept = self.mine[top.indices.cpu()].numpy()
            made.append(Distributions(kept, top.values.cpu().numpy(), rest.cpu().numpy(), [mine for mine, _ in places]))
        return made


class _Remote(_Asked):
    """An endpoint that gives prompt_logprobs."""

    def __init__(self, config: Config, endpoint: Endpoint, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.sampler, self.name = endpoint.open(), f"{endpoint.model} at {endpoint.url}"

    def along(self, questions: Sequence[Question]) -> list[Distributions]:
        told = self.sampler.prompt_logprobs([(*one.prompt, *one.response) for one in questions], kept=self.config.kept)
        return [
            self._read(one.response, places[len(one.prompt) :]) for one, places in zip(questions, told, strict=True)
        ]

    def _read(self, response: Sequence[int], told: Sequence[Mapping[int, PromptToken] | None]) -> Distributions:
        kept = self.config.kept
        tokens, logprobs = [], []
        for number, place in zip(response, told, strict=True):
            if place is None or number not in place:
                raise TeacherError(f"{self.name} does not read token {number} where it was sent: another tokenizer?")
            self._check(number, place[number].text)
            best = sorted(place.items(), key=lambda item: (-item[1].logprob, item[0]))[:kept]
            if len(best) < kept:
                raise TeacherError(
                    f"{self.name} gives {len(best)} tokens at a place where {kept} were asked for: raise the server's "
                    "bound (vLLM: --max-logprobs) or lower kept"
                )
            tokens.append([token for token, _ in best])
            logprobs.append([one.logprob for _, one in best])
        found = np.asarray(logprobs, dtype=np.float64)
        rest = np.log(np.clip(1 - np.exp(found).sum(-1), LEAST_PROBABILITY, None))
        return Distributions(np.asarray(tokens), found, rest)

    def _check(self, number: int, text: str | None) -> None:
        mine = self.tokenizer.decode([number])
        if text and mine.strip() and "\ufffd" not in mine + text and text.strip(" \u2581\u0120") != mine.strip():
            raise TeacherError(
                f"{self.name} reads token {number} as {text!r} and the student as {mine!r}: they have different "
                "tokenizers, so their distributions cannot be compared token by token"
            )


def hidden_along(
    model: LanguageModel, read: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Float[Tensor, "_ width"]]:
    """For each prompt and response the hidden states from which a model predicts the response's tokens."""
    strips = [strip((*prompt, *told), [False] * len(prompt) + [True] * len(told)) for prompt, told in read]
    batch = pack(strips, 0).to(model.device)
    with torch.no_grad():
        states = model(batch.tokens, batch.positions, batch.attended)
    if not bool(states.isfinite().all()):
        raise TeacherError("the teacher gives NaN or infinite hidden states: look at its weights and its precision")
    trained = batch.weights > 0
    owner, flat = batch.segments[trained], states[trained]
    return [flat[owner == index] for index in range(len(read))]


def likeliest(logits: Tensor, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, log-probabilities, and the log-probability of all others together."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(kept, dim=-1)
    rest = logprobs.scatter(1, top.indices, float("-inf")).logsumexp(-1)
    return top.indices.cpu().numpy(), top.values.cpu().numpy(), rest.cpu().numpy()


def _figures(signal: Signal, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> dict[str, Any]:
    """How much probability was not stored, and which tokens have a distribution."""
    tails, taught, tokens = [], 0, 0
    for question in (one for pair in pairs for one in _questions(tokenizer, pair)):
        stored = signal.read(question.prompt, question.response)
        tails.append(np.exp(stored.rest))
        taught += int(stored.taught.sum())
        tokens += len(stored.taught)
    tail = np.concatenate(tails)
    return {
        "taught_share": round(taught / tokens, 4),
        "tail_mean": float(tail.mean()),
        "tail_99_percent": float(np.quantile(tail, 0.99)),
        "tail_largest": float(tail.max()),
    }


def _truncation(
    asked: _Asked, student: LanguageModel, tokenizer: Tokenizer, pairs: Sequence[Pair], signal: Signal
) -> dict[str, float | int]:
    """The forward divergence from the student with the whole distributions and with what was stored, in nats a token.

    On the first pairs. The student is taken as it is now: the further it moves away in the tokens that are not kept,
    the more of the divergence the stored teacher misses.
    """
    assert asked.model is not None
    whole: list[float] = []
    stored: list[float] = []
    student.to(asked.model.device)
    for one in (question for pair in pairs[:MEASURED_PAIRS] for question in _questions(tokenizer, pair)):
        along = [(one.prompt, one.response)]
        (hidden,), (taught,) = hidden_along(student, along), hidden_along(asked.model, along)
        read = signal.read(one.prompt, one.response)
        tokens, logprobs, rest = (torch.from_numpy(array) for array in read[:3])
        cached = CachedTeacher(tokens, logprobs, signal.temperature, rest).to(hidden.device)
        for teacher, values in ((LiveTeacher(taught, asked.model.unembedding), whole), (cached, stored)):
            with torch.no_grad():
                values += chunked_kl(
                    hidden,
                    student.unembedding,
                    teacher,
                    temperature=signal.temperature,
                    vocabulary=tokenizer.vocab_size,
                ).tolist()
    errors = [abs(one - other) for one, other in zip(whole, stored, strict=True)]
    return {
        "tokens": len(whole),
        "mean_divergence": fmean(whole),
        "mean_stored_divergence": fmean(stored),
        "mean_error": fmean(errors),
        "largest_error": max(errors),
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Both responses of each pair go through the teacher once; about 100 tokens a response."""
    pairs = max(1.0, inputs["pairs"].records.get("pairs.jsonl", inputs["pairs"].disk_bytes / 2000))
    tokens = 200 * pairs
    teacher = inputs[config.teacher.input].parameters if isinstance(config.teacher, Checkpoint) else 0.0
    return Estimate(
        tokens=tokens,
        flops=2 * teacher * tokens,
        memory_bytes=4 * teacher + 1e9,
        disk_bytes=tokens * (8 + 6 * config.kept),
    )
