"""What may be asked over HTTP, and how its answer is written: the OpenAI interface's requests and choices."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from upweight.app.engine import Piece
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer

DEFAULT_TEXT_TOKENS = 16
MOST_ANSWERS = 16


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def message(self) -> Message:
        """The turn as a record; parts of text are joined."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class Asked(BaseModel, ABC):
    """What both kinds of requests have in common. Fields that we do not know are passed over, as clients expect."""

    object: ClassVar[str]
    chunk_object: ClassVar[str]
    prefix: ClassVar[str]

    model: str = ""
    temperature: Annotated[float, Field(ge=0, le=5)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: str | Annotated[list[str], Field(max_length=8)] | None = None
    top_k: int = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int | None = None
    return_token_ids: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool: ...

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of each answer's prompt, `n` times each."""

    @abstractmethod
    def wanted_tokens(self) -> int | None:
        """The longest answer asked for; None leaves it to us."""

    @abstractmethod
    def opening(self, index: int) -> Mapping[str, Any] | None:
        """The choice that opens a stream, where the interface has one."""

    @abstractmethod
    def piece(self, index: int, piece: Piece, finish: str | None, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """One choice of a streamed chunk."""

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece], finish: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """One choice of a whole answer."""

    def token_ids(self, pieces: Sequence[Piece]) -> dict[str, list[int]]:
        """The ids of the answer's tokens where they were asked for, as vLLM gives them."""
        return {"token_ids": [piece.token for piece in pieces]} if self.return_token_ids else {}

    def limits(self, room: int, seed: int, index: int) -> Limits:
        """How to decode the answer `index`. Raises UserError where the prompt leaves no room."""
        if room < 1:
            raise UserError("the conversation fills the model's context: shorten it")
        wanted = self.wanted_tokens()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Limits(
            max_new_tokens=min(room, wanted or room),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),  # -1 is how others say that all are kept
            min_p=self.min_p,
            stop=tuple(text for text in stop if text),
            seed=(seed if self.seed is None else self.seed) + index,
        )


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    prefix: ClassVar[str] = "chatcmpl"

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        if self.tools:
            raise UserError("tools are not served yet: leave them out, or describe them in the system message")
        if self.top_logprobs:
            raise UserError("top_logprobs is not served: logprobs gives that of the chosen token")
        return [render(tokenizer, [turn.message() for turn in self.messages])] * self.n

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def opening(self, index: int) -> Mapping[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, piece: Piece, finish: str | None, tokenizer: Tokenizer) -> Mapping[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "finish_reason": finish} | self._logprobs([piece], tokenizer)

    def choice(self, index: int, pieces: Sequence[Piece], finish: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": finish, **self.token_ids(pieces)}
        return choice | self._logprobs(pieces, tokenizer)

    def _logprobs(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
        if not self.wants_logprobs:
            return {"logprobs": None}
        rows = [
            {
                "token": tokenizer.decode([piece.token]),
                "logprob": piece.logprob,
                "bytes": list(tokenizer.decode([piece.token]).encode()),
                "top_logprobs": [],
            }
            for piece in pieces
        ]
        return {"logprobs": {"content": rows, "refusal": None}}


class TextRequest(Asked):
    """POST /v1/completions"""

    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl"

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    logprobs: int | None = None
    echo: bool = False

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        if self.echo or self.logprobs not in (None, 0, 1):
            raise UserError("echo, and logprobs above 1, are not served")
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        read = [tokenizer.encode(text) or [tokenizer.end_of_text] for text in texts]
        return [tokens for tokens in read for _ in range(self.n)]

    def wanted_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_TEXT_TOKENS

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, piece: Piece, finish: str | None, tokenizer: Tokenizer) -> Mapping[str, Any]:
        return self.choice(index, [piece], finish, tokenizer)

    def choice(
        self, index: int, pieces: Sequence[Piece], finish: str | None, tokenizer: Tokenizer
    ) -> Mapping[str, Any]:
        logprobs = None
        if self.wants_logprobs:
            tokens = [tokenizer.decode([piece.token]) for piece in pieces]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [piece.logprob for piece in pieces],
                "top_logprobs": [{token: piece.logprob} for token, piece in zip(tokens, pieces, strict=True)],
                "text_offset": [],
            }
        text = "".join(piece.text for piece in pieces)
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return {**choice, **self.token_ids(pieces)}
