"""The official client works unchanged, and requests that are wrong, large or too many are refused in its own terms."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import uvicorn
from tiny_checkpoint import tiny_checkpoint

from upweight.app.engine import Engine
from upweight.app.serve import ServeConfig, make_app
from upweight.model.weights import load
from upweight.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "Ann has 3 apples?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


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
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt"}', 404, "tiny"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400, "tools"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 5000 + b'"}]}', 400, "context"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 200_000 + b'"}]}', 413, "100,000 bytes"),
    ],
)
def test_what_is_refused(base: str, body: bytes, status: int, told: str) -> None:
    reply = httpx.post(f"{base}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert told in reply.json()["error"]["message"]


def test_a_body_without_a_declared_length_is_bounded_too(base: str) -> None:
    pieces = (b"x" * 10_000 for _ in range(50))
    reply = httpx.post(f"{base}/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


def test_another_name_for_this_machine_is_refused(base: str) -> None:
    assert httpx.get(f"{base}/v1/models", headers={"Host": "attacker.example"}).status_code == 400


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
