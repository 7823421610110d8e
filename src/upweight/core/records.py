"""The nouns of the recipe: what flows from stage to stage and is stored as one JSON object a line.

Frozen, slotted and free of torch, so that reading a rollout does not load a tensor library. A record checks itself when
it is made: a bad value fails where it arises, not three stages later.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

DIMENSION_COUNT = 20
HIGHEST_SCORE = 9

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus. `source` names where it came from, the unit in which mixtures and ledgers count."""

    id: str
    text: str
    source: str

    @classmethod
    def of(cls, text: str, source: str) -> "Document":
        """A document named by its content: the first 16 hexadecimal digits of the SHA-256 of its UTF-8 bytes."""
        return cls(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16], text, source)


@dataclass(frozen=True, slots=True)
class Tags:
    """The quality scores of a document: one integer 0-9 a dimension, in the order of curate/dimensions.py."""

    document_id: str
    scores: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != DIMENSION_COUNT:
            raise ValueError(f"document {self.document_id}: {len(self.scores)} scores, expected {DIMENSION_COUNT}")
        if any(not 0 <= score <= HIGHEST_SCORE for score in self.scores):
            raise ValueError(f"document {self.document_id}: scores {self.scores} leave 0-{HIGHEST_SCORE}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant turn asks for. `arguments` is the JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `trained` is False for a turn that stays in the context but out of the loss (a flawed turn). Only assistant turns
    are ever trained on, whatever the flag says of others.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns to imitate in supervised fine-tuning.

    Attributes:
        source: what mixtures and ledgers count by.
        tools: the functions that may be called, as JSON schemas; the chat template writes them into the prompt.
    """

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """A question that can be checked: by `answer` (equivalence), by `tests` (Python test code), by a verifier of its
    own that `check` tells what it needs to know, or by preference.

    Attributes:
        messages: the conversation so far; the last one is the user's.
        answer: the reference answer, None where there is none.
        tests: Python sources, each of which raises where the solution is wrong. Hidden from the model.
        source: the family or data set it comes from.
        check: JSON text for the verifier of its source, None where answer or tests say it all.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    tests: tuple[str, ...] = ()
    source: str = ""
    check: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler answered to one prompt.

    Attributes:
        tokens: the token ids that were generated, the end-of-turn token included where it was generated.
        logprobs: one a token, in nats, under the distribution actually sampled from (temperature and top-p applied).
            Empty where the sampler cannot tell.
        text: the decoded tokens without the end-of-turn token.
        stop: why it ended: "end" (the model said so), "length" (truncated), "stop" (a stop string), "tool" or "error".
        policy: the fingerprint of the weights or the name of the endpoint that sampled it.
        raw_logprobs: one a token, in nats, under the model itself, before temperature and truncation. Empty unless the
            sampler was asked for them.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stop: str
    policy: str
    raw_logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for told in (self.logprobs, self.raw_logprobs):
            if told and len(told) != len(self.tokens):
                raise ValueError(f"{len(told)} log-probabilities for {len(self.tokens)} tokens: expected one each")

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut it off before the model ended its turn."""
        return self.stop == "length"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of one completion: a finite score, by convention 0-1, and why."""

    score: float
    reason: str

    def __post_init__(self) -> None:
        if self.score != self.score or self.score in (float("inf"), float("-inf")):
            raise ValueError(f"a verdict of {self.score} is not finite (reason given: {self.reason})")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one problem, the chosen one clearly better."""

    problem: Problem
    chosen: Completion
    rejected: Completion


@dataclass(frozen=True, slots=True)
class Rollout:
    """A group: several completions of one problem by one policy, and a verdict for each."""

    problem: Problem
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.verdicts):
            raise ValueError(
                f"problem {self.problem.id}: {len(self.completions)} completions but {len(self.verdicts)} verdicts"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a benchmark's problem and its verdict, as stored: what every figure can be computed from again.

    Attributes:
        problem: the id of the problem.
        index: which of the k samples of the problem.
        stop, tokens, text: of the completion; `tokens` is how many, 0 where an endpoint does not tell.
        question, answer: the last message of the problem and its reference answer.
    """

    problem: str
    index: int
    score: float
    reason: str
    stop: str
    tokens: int
    text: str
    question: str
    answer: str | None
