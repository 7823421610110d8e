"""The official client works unchanged, and requests that are wrong, large or too many are refused in its own terms."""

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from tiny_checkpoint import tiny_checkpoint

from upweight.app.engine import Engine, Piece, Request
from upweight.app.serve import ServeConfig, make_app, serve
from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.model.weights import load
from upweight.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "Ann has 3 apples?"}]


class Served(NamedTuple):
    base: str
    engine: Engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    engine = Engine(load(directory)[0], Tokenizer.load(directory), rows=4)
    config = ServeConfig(max_new_tokens=200, concurrent=8, body_bytes=100_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "tiny", config), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Served(f"http://127.0.0.1:{port}", engine)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def base(served: Served) -> str:
    return served.base


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


def test_models_and_page(base: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert "<textarea" in httpx.get(base).text


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**given)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 20
    stream = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_several_answers_and_logprobs(client: openai.OpenAI) -> None:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "seed": 1}
    answered = client.chat.completions.create(**given, n=3, logprobs=True)
    assert [choice.index for choice in answered.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answered.choices}) > 1
    assert all(row.logprob <= 0 for row in answered.choices[0].logprobs.content)


def test_null_stands_for_the_default(base: str) -> None:
    fields = ("temperature", "top_p", "n", "stop", "seed", "stream", "max_tokens", "logprobs", "tools", "logit_bias")
    body = {"messages": QUESTION, **dict.fromkeys(fields), "max_completion_tokens": 3, "ignore_eos": False}
    nothing = {"presence_penalty": 0, "response_format": {"type": "text"}}
    reply = httpx.post(f"{base}/v1/chat/completions", json={**body, **nothing})
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"logit_bias": {"5": -100}},
        {"functions": [{"name": "f"}]},
        {"best_of": 4},
        {"repetition_penalty": 1.1},
        {"min_tokens": 5},
        {"ignore_eos": True},
        {"stop_token_ids": [7]},
    ],
)
def test_what_would_change_the_answer_is_not_passed_over(client: openai.OpenAI, field: dict[str, object]) -> None:
    (name,) = field
    with pytest.raises(openai.BadRequestError, match=f"{name} is not served"):
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2, extra_body=field)


def test_no_temperature_ends_the_server(client: openai.OpenAI) -> None:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, "seed": 1}
    cold = [client.chat.completions.create(**given, temperature=value) for value in (0, 1e-300, 1e-40, 1e-9)]
    assert len({answer.choices[0].message.content for answer in cold}) == 1
    assert client.chat.completions.create(**given, top_p=1e-12, extra_body={"top_k": 10**9}).choices
    assert client.chat.completions.create(**{**given, "seed": -(2**62)}, temperature=5).choices


def test_one_model_is_told(base: str, client: openai.OpenAI) -> None:
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="called 'tiny'"):
        client.models.retrieve("owner/other")


def test_a_defect_is_told_in_the_interfaces_form(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given, **named):
        raise ZeroDivisionError

    monkeypatch.setattr(served.engine, "submit", broken)
    reply = httpx.post(f"{served.base}/v1/chat/completions", json={"messages": QUESTION})
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"


def test_a_prompt_may_be_tokens(served: Served, client: openai.OpenAI) -> None:
    given = {"model": "tiny", "max_tokens": 5, "seed": 1}
    tokens = served.engine.tokenizer.encode("Ann has")
    text = client.completions.create(**given, prompt="Ann has").choices[0].text
    assert client.completions.create(**given, prompt=tokens).choices[0].text == text
    several = client.completions.create(**given, prompt=[tokens, tokens[:1]]).choices
    assert [several[0].text, len(several)] == [text, 2]
    for wrong in ([10**9], [-1], [[0], [10**6]]):
        with pytest.raises(openai.BadRequestError, match="the vocabulary has"):
            client.completions.create(**given, prompt=wrong)


def test_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=["Ann", "Bob"], max_tokens=5, seed=1, logprobs=0)
    assert len(whole.choices) == 2
    streamed = client.completions.create(model="tiny", prompt="Ann", max_tokens=5, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "valid"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "role"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 10000}', 400, "n"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 64}', 429, "try again"),  # more than 8 at once here
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt"}', 404, "tiny"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400, "tools"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', 400, "cannot be made to call"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}', 400, "needs logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 50}', 400, "top_logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, ""),
        (b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400, ""),
        (b"", 400, "body"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 5000 + b'"}]}', 400, "context"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 200_000 + b'"}]}', 413, "100,000 bytes"),
    ],
)
def test_what_is_refused(base: str, body: bytes, status: int, told: str) -> None:
    reply = httpx.post(f"{base}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert told in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "field", [{"port": 70_000}, {"port": -1}, {"rows": 0}, {"concurrent": 0}, {"max_new_tokens": 0}]
)
def test_settings_that_are_none_are_refused(field: dict[str, int]) -> None:
    (name,) = field
    with pytest.raises(UserError, match=f"{name} is"):
        ServeConfig(**field)


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeConfig(port=taken.getsockname()[1])
        with pytest.raises(UserError, match=f"127.0.0.1, port {config.port}, cannot be listened on"):
            serve("no model", root=tmp_path, machine=Machine(), config=config)
    with pytest.raises(UserError, match="cannot be listened on"):
        serve("no model", root=tmp_path, machine=Machine(), config=ServeConfig(host="nowhere.invalid"))
    assert capsys.readouterr().out == ""


def test_a_body_without_a_declared_length_is_bounded_too(base: str) -> None:
    pieces = (b"x" * 10_000 for _ in range(50))
    reply = httpx.post(f"{base}/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


def test_another_name_for_this_machine_is_refused(base: str) -> None:
    assert httpx.get(f"{base}/v1/models", headers={"Host": "attacker.example"}).status_code == 400


def test_ten_megabytes_are_read_and_refused(base: str) -> None:
    content = b'{"messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}'
    for given in (content, iter([content[:5_000_000], content[5_000_000:]])):
        reply = httpx.post(f"{base}/v1/chat/completions", content=given, timeout=60)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "too_large"


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def says(engine: Engine, text: str):
    """Make the engine answer with `text`, token by token, whatever it is asked."""

    def submit(prompt, limits, deliver, *, seconds, alternatives):
        tokens = engine.tokenizer.encode(text)
        for token in tokens:
            deliver(Piece(token, -0.5, engine.tokenizer.decode([token])))
        deliver(Piece(engine.tokenizer.end_of_turn, -0.1, "", "end"))
        return Request(prompt, limits, deliver, 1.0)

    return submit


def test_tool_calls(served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    monkeypatch.setattr(served.engine, "submit", says(served.engine, text))
    given = {"model": "tiny", "messages": QUESTION, "tools": [TOOL]}
    (choice,) = client.chat.completions.create(**given).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Adding."
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1, "b": 2}')
    with client.chat.completions.stream(**given) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": 1, "b": 2}'
    # the result goes back with the call, and without tools the text is left as it is
    history = [
        *QUESTION,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    assert client.chat.completions.create(**{**given, "messages": history}).choices[0].message.tool_calls
    plain = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert plain.choices[0].message.content == text
    assert plain.choices[0].message.tool_calls is None


def test_the_likeliest_tokens_are_told(client: openai.OpenAI) -> None:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, "seed": 1, "logprobs": True, "top_logprobs": 3}
    for temperature in (0.0, 1.0):
        answered = client.chat.completions.create(**given, temperature=temperature)
        for row in answered.choices[0].logprobs.content:
            told = [other.logprob for other in row.top_logprobs]
            assert len(told) == 3
            assert told == sorted(told, reverse=True)
            assert row.logprob <= told[0] + 1e-6
            assert sum(map(math.exp, told)) <= 1 + 1e-6
            if temperature == 0:
                assert row.token == row.top_logprobs[0].token
                assert row.logprob == pytest.approx(told[0], abs=1e-6)
    text = client.completions.create(model="tiny", prompt="Ann", max_tokens=2, logprobs=2, temperature=0)
    assert all(len(likely) == 2 for likely in text.choices[0].logprobs.top_logprobs)


def test_too_many_are_turned_away_and_the_rest_answered(client: openai.OpenAI) -> None:
    def ask(seed: int) -> int:
        try:
            client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=200, seed=seed, n=2)
        except openai.RateLimitError:
            return 429
        return 200

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(ask, range(12)))
    assert statuses.count(200) >= 4
    assert set(statuses) <= {200, 429}


def test_a_client_that_has_left_before_the_first_byte_frees_its_place(served: Served) -> None:
    app = make_app(served.engine, "tiny", ServeConfig(concurrent=8))
    body = json.dumps({"messages": QUESTION, "stream": True, "n": 8, "max_tokens": 200}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    place = {"path": "/v1/chat/completions", "query_string": b"", "root_path": "", "scheme": "http"}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "headers": headers,
        **place,
    }

    async def answered() -> list[int]:
        statuses: list[int] = []
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, object]:
            return next(given, {"type": "http.disconnect"})

        async def send(message: dict[str, object]) -> None:
            statuses.append(int(str(message["status"])))
            raise OSError("nobody is there")  # as servers of ASGI 2.4 tell it, here before the stream is begun

        with contextlib.suppress(OSError, ClientDisconnect):
            await app(scope, receive, send)
        return statuses

    for _ in range(3):  # eight answers each, and eight places in all
        assert asyncio.run(answered()) == [200]


def test_a_cut_connection_frees_its_place(base: str, client: openai.OpenAI) -> None:
    body = {"messages": QUESTION, "stream": True, "n": 8, "max_tokens": 200}
    for _ in range(5):  # eight answers each, and eight places in all
        deadline = time.monotonic() + 20
        while True:
            with httpx.stream("POST", f"{base}/v1/chat/completions", json=body) as reply:
                if reply.status_code == 200:
                    next(reply.iter_lines())
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    deadline = time.monotonic() + 20
    while True:
        try:
            client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2, n=8)
            break
        except openai.RateLimitError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
