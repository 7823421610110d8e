"""What may be asked over HTTP, and how its answer is written: the OpenAI interface's requests and choices."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from upweight.app.engine import UNFINISHED, Piece
from upweight.core.errors import UserError
from upweight.core.protocols import LEAST_TEMPERATURE, Limits
from upweight.core.records import Message, Role, ToolCall
from upweight.text.tokenizer import Tokenizer
from upweight.text.tool_calls import Reply, parse_reply, render_with_tools

DEFAULT_TEXT_TOKENS = 16
MOST_ANSWERS = 128
MOST_PROMPTS = 64
MOST_ALTERNATIVES = 20
UNSERVED: Mapping[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "functions": [],
    "function_call": "none",
    "suffix": "",
    "repetition_penalty": 1,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
}
"""Fields of the interface, and of vLLM's beside it, that would change the answer and are not served; and the value of
each that asks for nothing."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    name: str
    arguments: str = "{}"


class Called(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[Called], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    def message(self) -> Message:
        """The turn as a record; parts of text are joined."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or [])
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, text, tool_calls=calls, tool_call_id=self.tool_call_id)


class Function(BaseModel):
    """A function that may be called; its parameters are a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class FunctionTool(BaseModel):
    type: Literal["function"]
    function: Function


class Asked(BaseModel, ABC):
    """What both kinds of requests have in common. Fields that we do not know are passed over, as clients expect, and
    null stands for the default."""

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

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        """The fields that say something. An answer must not silently be another than was asked for."""
        if not isinstance(body, dict):
            return body
        asked = {name: value for name, value in body.items() if value is not None}
        for name, nothing in {**UNSERVED, "best_of": asked.get("n", 1)}.items():
            if asked.get(name, nothing) != nothing:
                raise ValueError(f"{name} is not served: leave it out")
        return asked

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool: ...

    @property
    @abstractmethod
    def alternatives(self) -> int:
        """How many of the likeliest tokens are to be told at each place."""

    @property
    def writes_whole(self) -> bool:
        """Whether a streamed answer can only be told once it is whole: one that may turn out to be calls."""
        return False

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

    def whole_piece(self, index: int, pieces: Sequence[Piece], finish: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """A whole answer as the one chunk of a stream."""
        return self.choice(index, pieces, finish, tokenizer)

    def limits(self, room: int, seed: int, index: int) -> Limits:
        """How to decode the answer `index`. Raises UserError where the prompt leaves no room."""
        if room < 1:
            raise UserError("the conversation fills the model's context: shorten it")
        wanted = self.wanted_tokens()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Limits(
            max_new_tokens=min(room, wanted or room),
            temperature=self.temperature if self.temperature >= LEAST_TEMPERATURE else 0.0,
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
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        return self.top_logprobs or 0

    @property
    def writes_whole(self) -> bool:
        return bool(self._schemas())

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        messages = [turn.message() for turn in self.messages]
        return [render_with_tools(tokenizer, messages, self._schemas())] * self.n

    def _schemas(self) -> list[dict[str, Any]]:
        """The functions that may be called. A choice that would have to be forced on the model is refused."""
        if self.tool_choice not in (None, "none", "auto"):
            raise UserError('tool_choice can be "auto" or "none": a model cannot be made to call a function here')
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools or []]

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def opening(self, index: int) -> Mapping[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, piece: Piece, finish: str | None, tokenizer: Tokenizer) -> Mapping[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "finish_reason": finish} | self._logprobs([piece], tokenizer)

    def whole_piece(self, index: int, pieces: Sequence[Piece], finish: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """A whole answer as the one chunk of a stream."""
        choice = dict(self.choice(index, pieces, finish, tokenizer))
        message = choice.pop("message")
        delta: dict[str, Any] = {"content": message["content"]}
        if "tool_calls" in message:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(message["tool_calls"])]
        return {**choice, "delta": delta}

    def choice(self, index: int, pieces: Sequence[Piece], finish: str, tokenizer: Tokenizer) -> Mapping[str, Any]:
        text = "".join(piece.text for piece in pieces)
        reply = parse_reply(text, prefix=f"call_{uuid.uuid4().hex[:12]}") if self._schemas() else Reply(text, ())
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.calls:
            finish = "tool_calls"
            message["content"] = reply.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reply.calls
            ]
        choice = {"index": index, "message": message, "finish_reason": finish, **self.token_ids(pieces)}
        return choice | self._logprobs(pieces, tokenizer)

    def _logprobs(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
        if not self.wants_logprobs:
            return {"logprobs": None}
        rows = [
            _told(piece.token, piece.logprob, tokenizer)
            | {"top_logprobs": [_told(token, logprob, tokenizer) for token, logprob in piece.alternatives]}
            for piece in pieces
        ]
        return {"logprobs": {"content": rows, "refusal": None}}


def _told(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token as the interface tells it; a part of a character has no bytes that anyone could show."""
    text = tokenizer.one_text(token)
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


def _known(tokens: Any, tokenizer: Tokenizer) -> list[int]:
    """Token ids that a client sends. Raises UserError for one that the vocabulary does not have."""
    unknown = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
    if unknown:
        raise UserError(f"the prompt has the token {unknown[0]}, but the vocabulary has {tokenizer.vocab_size:,}")
    return list(tokens)


class TextRequest(Asked):
    """POST /v1/completions"""

    object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl"

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool = False

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        if self.echo:
            raise UserError("echo is not served: send the prompt and read the answer")
        given: Sequence[str | int | list[int]] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        tokens = [part for part in given if isinstance(part, int)]
        parts = [tokens] if tokens else given
        read = [tokenizer.encode(part) if isinstance(part, str) else _known(part, tokenizer) for part in parts]
        return [tokens or [tokenizer.end_of_text] for tokens in read for _ in range(self.n)]

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
            tokens = [tokenizer.one_text(piece.token) for piece in pieces]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [piece.logprob for piece in pieces],
                "top_logprobs": [
                    {tokenizer.one_text(token): logprob for token, logprob in piece.alternatives}
                    or {tokenizer.one_text(piece.token): piece.logprob}
                    for piece in pieces
                ],
                "text_offset": [sum(map(len, tokens[:place])) for place in range(len(tokens))],
            }
        text = "".join(piece.text for piece in pieces)
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return {**choice, **self.token_ids(pieces)}
