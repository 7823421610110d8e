"""Sampling from a server that speaks OpenAI's HTTP interface: vLLM, SGLang, llama.cpp, `upweight serve`, or a service.

Many requests are in flight at once, but never more than `most_in_flight`: a slow server slows the caller down instead
of collecting requests.

Token ids and log-probabilities are kept only where they belong together: ids that the server sends itself (vLLM, asked
by extra={"return_token_ids": True}), with one finite log-probability of at most 0 for each. vLLM reports those of the
model before temperature and top-p unless it is started with `--logprobs-mode processed_logprobs`.
"""

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from upweight.core.identity import seed_for
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Message
from upweight.rollout.service import EndpointError, Read, Service, Unfit
from upweight.text.chat import prompt_tokens
from upweight.text.tokenizer import Tokenizer

_ROUNDING_NATS = 1e-4
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can hold it, and no file of text."""
_BROKEN_OFF = ("abort", "error")
"""How servers say that a choice was not written to its end, and another attempt may be."""
_STOPS = {"stop": "end", "length": "length", "tool_calls": "end", "function_call": "end"}


_Sent = str | tuple[int, ...] | tuple[Message, ...]
"""A prompt as the server is sent it."""


class PromptToken(NamedTuple):
    """A token that could have stood at a place: its log-probability in nats, and how the server writes it."""

    logprob: float
    text: str | None


class RemoteSampler(Sampler):
    """Samples from an OpenAI-compatible endpoint.

    Args:
        base_url: up to and with "/v1".
        model: the name that the server knows it by.
        key_variable: the environment variable that holds the key; a server without keys needs none.
        timeout_seconds: of one request, from start to end.
        attempts: how often a request is made before the sampler gives up.
        pause_seconds: before the second attempt; doubled before each further one.
        most_in_flight: requests at once.
        policy: written into each completion; None takes the model's name.
        extra: further fields of each request, for a server's own options.
        tokenizer: encodes prompts here, so that the server is sent tokens (vLLM and `upweight serve` take them), and
            what is trained on is what was sampled from, whatever the server's own template would make of a message. A
            completion that the server cuts off before its limit is then an error. None sends messages and text.

    Attributes:
        tokens_read, tokens_written: what the server has charged so far, by its own count ("usage"); 0 where it gives
            none. Requests that failed are in it where they were answered.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 600.0,
        attempts: int = 5,
        pause_seconds: float = 1.0,
        most_in_flight: int = 32,
        policy: str | None = None,
        extra: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.service = Service(
            base_url,
            key_variable=key_variable,
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            pause_seconds=pause_seconds,
            most_in_flight=most_in_flight,
        )
        self.base_url = self.service.base_url
        self.model = model
        self.policy = model if policy is None else policy
        self.extra = dict(extra or {})
        self.tokenizer = tokenizer
        self.tokens_read = self.tokens_written = 0
        self._counting = threading.Lock()

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """`count` completions for each prompt. Raises EndpointError where a request fails for good."""
        if not prompts or count < 1:
            return [[] for _ in prompts]
        seen: Counter[_Sent] = Counter()
        named: list[tuple[_Sent, int]] = []  # which of the prompts that are alike
        for prompt in map(self._sent, prompts):
            named.append((prompt, seen[prompt]))
            seen[prompt] += 1
        with self.service.connected() as client, ThreadPoolExecutor(self.service.most_in_flight) as threads:
            waiting = [threads.submit(self._group, client, *one, count, limits) for one in named]
            try:
                return [future.result() for future in waiting]
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise

    def prompt_logprobs(
        self, sequences: Sequence[Sequence[int]], *, kept: int
    ) -> list[list[Mapping[int, PromptToken] | None]]:
        """What the model would have said at each place of known sequences: vLLM's `prompt_logprobs`.

        Of each sequence one entry a token: its `kept` likeliest tokens with their log-probabilities at temperature 1,
        and the token that stands there; None for the first, which nothing precedes.

        Raises EndpointError where the server knows no prompt_logprobs, or gives fewer than asked for.
        """

        def asked(client: httpx.Client, tokens: Sequence[int]) -> list[Mapping[int, PromptToken] | None]:
            body = {
                "model": self.model,
                "prompt": list(tokens),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": kept,
                **self.extra,
            }
            return self._ask(client, "completions", body, lambda reply: self._prompt_logprobs(reply, len(tokens)))

        with self.service.connected() as client, ThreadPoolExecutor(self.service.most_in_flight) as threads:
            return list(threads.map(lambda tokens: asked(client, tokens), sequences))

    def _prompt_logprobs(self, reply: Any, count: int) -> list[Mapping[int, PromptToken] | None]:
        try:
            told = reply["choices"][0].get("prompt_logprobs")
            if not told:
                raise EndpointError(
                    f"{self.base_url} gives no prompt_logprobs: serve the teacher with vLLM (its option --max-logprobs "
                    "bounds how many tokens may be kept), or give its checkpoint as the teacher"
                )
            found: list[Mapping[int, PromptToken] | None] = [
                None
                if place is None
                else {
                    int(number): PromptToken(float(one["logprob"]), one.get("decoded_token"))
                    for number, one in place.items()
                }
                for place in told
            ]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise EndpointError(
                f"{self.base_url} does not give prompt_logprobs as vLLM does ({type(error).__name__}: {error}): "
                f"{json.dumps(reply)[:300]}"
            ) from error
        if len(found) != count or None in found[1:]:
            raise EndpointError(
                f"{self.base_url} gives prompt_logprobs for {len(found)} tokens where {count} were sent: it reads them "
                "with another tokenizer, or adds tokens of its own"
            )
        return found

    def _sent(self, prompt: Prompt) -> _Sent:
        if self.tokenizer is not None:
            return tuple(prompt_tokens(self.tokenizer, prompt))
        return prompt if isinstance(prompt, str) else tuple(prompt)

    def _group(self, client: httpx.Client, prompt: _Sent, repeat: int, count: int, limits: Limits) -> list[Completion]:
        """One prompt's completions. Servers that give fewer than `n` choices are asked again for the others."""
        group: list[Completion] = []
        while len(group) < count:
            place = (len(group), repeat) if repeat else (len(group),)
            body = self._body(prompt, count - len(group), place, limits)
            path = "completions" if "prompt" in body else "chat/completions"
            group += self._ask(client, path, body, self._completions)
        for completion in group if self.tokenizer is not None else ():
            if completion.truncated and len(completion.tokens) < limits.max_new_tokens:
                raise EndpointError(
                    f"{self.base_url} cut a completion off after {len(completion.tokens)} of {limits.max_new_tokens} "
                    f"tokens: with the prompt's {len(prompt)} they are longer than its context. Lower max_new_tokens, "
                    "shorten the prompt or serve a longer context"
                )
        return group[:count]

    def _body(self, prompt: _Sent, count: int, place: tuple[int, ...], limits: Limits) -> dict[str, Any]:
        """The request; `place` tells its seed from those of others for the same prompt."""
        if isinstance(prompt, str) or self.tokenizer is not None:
            asked: dict[str, Any] = {"prompt": prompt, "logprobs": 0}
            name: object = prompt
        else:
            messages = [_message(part) for part in prompt if isinstance(part, Message)]
            asked = {"messages": messages, "logprobs": True}
            name = messages
        body = {
            "model": self.model,
            **asked,
            "n": count,
            "max_tokens": limits.max_new_tokens,
            "temperature": limits.temperature,
            "top_p": limits.top_p,
            # 31 bits, which every server reads
            "seed": seed_for(limits.seed, name, *place) >> 32,
            **self.extra,
        }
        if limits.stop:
            body["stop"] = list(limits.stop)
        if limits.top_k:
            body["top_k"] = limits.top_k
        if limits.min_p:
            body["min_p"] = limits.min_p
        return body

    def _ask(
        self, client: httpx.Client, path: str, body: Mapping[str, Any], read: Callable[[Any], list[Read]]
    ) -> list[Read]:
        def counted(reply: Any) -> list[Read]:
            self._count(reply)
            return read(reply)

        return self.service.ask(client, path, body, counted)

    def _count(self, reply: Any) -> None:
        usage = reply.get("usage") if isinstance(reply, Mapping) else None
        charged = usage if isinstance(usage, Mapping) else {}
        read, written = (charged.get(name) for name in ("prompt_tokens", "completion_tokens"))
        with self._counting:
            self.tokens_read += read if isinstance(read, int) else 0
            self.tokens_written += written if isinstance(written, int) else 0

    def _completions(self, reply: Any) -> list[Completion]:
        if isinstance(reply, Mapping) and reply.get("error"):  # gateways say 200 before they know
            raise Unfit(f"an error in place of an answer: {json.dumps(reply['error'])[:300]}")
        try:
            choices = [choice for choice in reply["choices"] if choice.get("finish_reason") not in _BROKEN_OFF]
            made = [self._completion(choice) for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise EndpointError(
                f"{self.base_url} does not answer as OpenAI's interface does ({type(error).__name__}: {error}): "
                f"{json.dumps(reply)[:300]}"
            ) from error
        if not made:
            raise Unfit("an answer without choices that were written to their end")
        return made

    def _completion(self, choice: Mapping[str, Any]) -> Completion:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError(f"a text that is a {type(text).__name__}")
        stop = _STOPS.get(choice.get("finish_reason") or "stop", "error")
        if stop == "end" and isinstance(choice.get("stop_reason"), str):
            stop = "stop"  # vLLM names the stop string that was found
        tokens = tuple(choice.get("token_ids") or ())
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise TypeError("token ids that are no numbers of tokens")
        return Completion(tokens, self._logprobs(choice, tokens), _HALF.sub("\ufffd", text or ""), stop, self.policy)

    def _logprobs(self, choice: Mapping[str, Any], tokens: Sequence[int]) -> tuple[float, ...]:
        """One a token, or none. Raises EndpointError for numbers that no distribution gives."""
        told = choice.get("logprobs") or {}
        if "content" in told:
            numbers = [entry["logprob"] for entry in told["content"] or ()]
        else:
            numbers = list(told.get("token_logprobs") or ())
        for number in numbers:
            if not isinstance(number, (int, float)) or not math.isfinite(number) or number > _ROUNDING_NATS:
                raise EndpointError(
                    f"{self.base_url} reports a log-probability of {number}: expected a finite number of at most 0"
                )
        return tuple(min(float(number), 0.0) for number in numbers) if len(numbers) == len(tokens) else ()


def _message(message: Message) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        sent["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        sent["tool_call_id"] = message.tool_call_id
    return sent
