"""The interfaces. Each concrete class is a leaf: it implements one of these and nothing derives from it.

A language model in any role (annotator, teacher, critic, reviser, judge) is a Sampler. Every reward is a Verifier.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.core.records import Completion, Message, Problem, Sample, Verdict

if TYPE_CHECKING:
    from upweight.core.batches import Loss

Prompt = str | Sequence[Message]
"""What a sampler continues: a conversation, rendered by the model's own chat template, or raw text taken as it is."""


LEAST_TEMPERATURE = 1e-4
"""The smallest temperature that is not greedy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How to decode.

    Attributes:
        max_new_tokens: a completion that reaches this many tokens stops with "length".
        temperature: 0 takes the likeliest token; otherwise, from 0.0001, logits are divided by it.
        top_p: the smallest set of tokens whose probability reaches this is kept and renormalised; 1 keeps all.
        top_k: only the k likeliest tokens are kept; 0 keeps all.
        min_p: tokens below this share of the likeliest token's probability are dropped; 0 keeps all.
        stop: strings that end the completion; they are not part of its text.
        seed: same seed, same completions, whatever else is in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: at least one token has to be sampled")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: 0 is greedy, above 0 samples")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}: logits divided by so little may leave the range of floats, and "
                "the likeliest token has all of the probability: say 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it is a share in (0, 1]")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}: expected a tuple of texts that are not empty, as in ('END',)")
        if self.top_k < 0 or not 0 <= self.min_p < 1:
            raise ValueError(f"top_k is {self.top_k} and min_p {self.min_p}: expected top_k >= 0 and min_p in [0, 1)")


class Objective(ABC):
    """What a training step minimises."""

    @abstractmethod
    def __call__(self, policy: Any, batch: Any) -> "Loss":
        """The loss of one microbatch as a sum and its weight; the trainer divides once, over the whole step."""


class Sampler(ABC):
    """A language model that answers prompts."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """`count` completions for each prompt, in the order of the prompts."""


class Verifier(ABC):
    """A judge of completions."""

    @abstractmethod
    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        """One verdict a completion, in order. The whole group is given because pairwise rewards need it."""

    def answer_of(self, text: str) -> str | None:
        """The answer that a text settles on, equal answers written alike, for votes among several; None where it gives
        none, or this verifier does not judge answers that could be counted."""
        return None


REPORTED = Limits(max_new_tokens=65_536, temperature=0.6, top_p=0.95)
"""How the report decodes on every benchmark (arXiv 2512.06266, section 6)."""


class Benchmark(ABC):
    """A set of problems, how to ask and judge them, and how often to sample each.

    Attributes:
        name: what tables call it.
        samples: completions of each problem, the k of avg@k.
        verifier: judges the completions.
        limits: how to decode unless the user says otherwise.
        lower_is_better: its scores are no shares of right answers but a loss.
    """

    name: str
    samples: int
    verifier: Verifier
    limits: Limits = REPORTED
    lower_is_better: bool = False

    @abstractmethod
    def problems(self) -> Sequence[Problem]:
        """The problems, in a fixed order."""

    def ask(self, sampler: Sampler, problems: Sequence[Problem], limits: Limits) -> list[list[Completion]]:
        """`samples` completions of each problem: a plain question unless a benchmark asks otherwise (in turns, say)."""
        return sampler.sample([problem.messages for problem in problems], count=self.samples, limits=limits)

    def figures(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        """What the benchmark reports beyond avg@k, by name: shares of categories, a corrected score."""
        return {}


class Store(ABC):
    """Where artifacts live, by name."""

    @abstractmethod
    def identity(self, name: str) -> Mapping[str, object] | None:
        """The identity that the artifact was built from, None where there is no complete artifact of that name."""

    @abstractmethod
    def create(self, name: str, identity: Mapping[str, object]) -> Any:
        """A context manager that yields the directory to build in; leaving it without an error completes the artifact.

        A directory left by a killed run of the same identity is handed out again with its contents, so that the stage
        can resume; one of another identity is emptied first.
        """

    @abstractmethod
    def open(self, name: str) -> Path:
        """The directory of a complete artifact. Raises UserError where it is missing."""
