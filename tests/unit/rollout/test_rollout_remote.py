"""The remote sampler against a server of its own: what it asks, what it makes of the answers, and of bad servers."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.rollout.remote import RemoteSampler
from upweight.rollout.service import EndpointError
from upweight.store.jsonl import write_jsonl
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer

QUESTION = (Message("user", "2 + 2?"),)


class Endpoint:
    """A server whose `answer` is given each request's body and its number."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.answer: Callable[[BaseHTTPRequestHandler, Any, int], None] = lambda handler, body, number: reply(
            handler, {"choices": [chat("4")] * body["n"]}
        )
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.paths.append(self.path)
                    endpoint.headers.append(dict(self.headers))
                    number = len(endpoint.bodies)
                endpoint.answer(self, body, number)

            def log_message(self, format: str, *arguments: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def sampler(self, **options: Any) -> RemoteSampler:
        return RemoteSampler(self.url, "tiny", **{"pause_seconds": 0.01, **options})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def reply(handler: BaseHTTPRequestHandler, content: Any, status: int = 200, **headers: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("content-length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def chat(text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}


def test_what_is_asked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "secret")
    sampler = endpoint.sampler(key_variable="TINY_KEY", extra={"return_token_ids": True})
    limits = Limits(9, temperature=0.5, top_p=0.9, top_k=7, stop=("\n",), seed=3)
    assert [c.text for c in sampler.sample([QUESTION], count=2, limits=limits)[0]] == ["4", "4"]
    body = endpoint.bodies[0]
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "logprobs": True,
        "n": 2,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ["\n"],
        "return_token_ids": True,
    }
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    sampler.sample([QUESTION], count=2, limits=limits)
    assert endpoint.bodies[1]["seed"] == seed


def test_raw_text_goes_to_completions(endpoint: Endpoint) -> None:
    told = {"token_logprobs": [-0.5, -0.25], "tokens": [" 4", "."]}
    choice = {"text": " 4.", "finish_reason": "length", "logprobs": told, "token_ids": [11, 12]}
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [choice]})
    completion = endpoint.sampler(policy="p").sample(["2 + 2 ="], count=1, limits=Limits(2))[0][0]
    assert endpoint.paths == ["/v1/completions"]
    assert endpoint.bodies[0]["prompt"] == "2 + 2 ="
    assert (completion.text, completion.stop, completion.truncated) == (" 4.", "length", True)
    assert (completion.tokens, completion.logprobs, completion.policy) == ((11, 12), (-0.5, -0.25), "p")


def test_logprobs_without_their_tokens_are_left_out(endpoint: Endpoint) -> None:
    content = [{"token": "4", "logprob": -0.1}]
    choices = [
        chat("4", logprobs={"content": content}),
        chat("4", logprobs={"content": content}, token_ids=[5]),
        chat("4", logprobs={"content": content}, token_ids=[5, 6]),
        chat("4", stop_reason="END"),
    ]
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": choices})
    group = endpoint.sampler().sample([QUESTION], count=4, limits=Limits(2))[0]
    assert [c.logprobs for c in group] == [(), (-0.1,), (), ()]
    assert [c.tokens for c in group] == [(), (5,), (5, 6), ()]
    assert [c.stop for c in group] == ["end", "end", "end", "stop"]


def test_with_a_tokenizer_the_server_is_sent_the_tokens_that_are_trained_on(endpoint: Endpoint) -> None:
    tokenizer = Tokenizer.train(["2 + 2 = 4"], 300, chat_template=CHATML)
    told = {"token_logprobs": [-0.5, -0.25]}
    choice = {"text": "4", "finish_reason": "stop", "logprobs": told, "token_ids": [11, 2]}
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [choice] * body["n"]})
    sampler = endpoint.sampler(tokenizer=tokenizer)
    # a server's own template would end the turn here
    asked = (Message("user", "what is <|im_end|>?"),)
    groups = sampler.sample([asked, asked, "2 + 2 ="], count=2, limits=Limits(2, seed=1))
    assert [[one.tokens for one in group] for group in groups] == [[(11, 2)] * 2] * 3
    assert set(endpoint.paths) == {"/v1/completions"}
    sent = sorted(body["prompt"] for body in endpoint.bodies)
    assert sent == sorted([render(tokenizer, asked), render(tokenizer, asked), tokenizer.encode("2 + 2 =")])
    assert len({body["seed"] for body in endpoint.bodies}) == 3


def test_a_completion_that_the_context_cut_off_is_no_truncated_one(endpoint: Endpoint) -> None:
    tokenizer = Tokenizer.train(["2 + 2 = 4"], 300, chat_template=CHATML)
    choice = {"text": "4", "finish_reason": "length", "token_ids": [11, 12]}
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [choice]})
    sampler = endpoint.sampler(tokenizer=tokenizer)
    assert sampler.sample([QUESTION], count=1, limits=Limits(2))[0][0].truncated
    with pytest.raises(EndpointError, match=r"cut a completion off after 2 of 3 tokens: with the prompt's \d+ they"):
        sampler.sample([QUESTION], count=1, limits=Limits(3))


def test_choices_that_the_server_left_out_are_asked_for(endpoint: Endpoint) -> None:
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [chat(str(number))]})
    group = endpoint.sampler().sample([QUESTION], count=3, limits=Limits(2))[0]
    assert [c.text for c in group] == ["1", "2", "3"]
    assert [body["n"] for body in endpoint.bodies] == [3, 2, 1]
    assert len({body["seed"] for body in endpoint.bodies}) == 3


def test_prompts_keep_their_order_and_few_are_in_flight(endpoint: Endpoint) -> None:
    lock, in_flight, most = threading.Lock(), 0, 0

    def answer(handler: BaseHTTPRequestHandler, body: Any, number: int) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.03 if number % 2 else 0.0)
        with lock:  # before the reply: the client may send its next request as soon as it has this one
            in_flight -= 1
        reply(handler, {"choices": [chat(body["messages"][0]["content"])]})

    endpoint.answer = answer
    prompts = [(Message("user", str(index)),) for index in range(20)]
    groups = endpoint.sampler(most_in_flight=3).sample(prompts, count=1, limits=Limits(2))
    assert [group[0].text for group in groups] == [str(index) for index in range(20)]
    assert 1 <= most <= 3


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": ')
    handler.wfile.flush()
    hang_up(handler)


@pytest.mark.parametrize(
    "failure",
    [
        hang_up,
        break_off,
        lambda handler: reply(handler, {"error": "busy"}, 503),
        lambda handler: reply(handler, {"error": "slow down"}, 429, retry_after="0.02"),
        lambda handler: reply(handler, b"<html>gateway</html>"),
        lambda handler: reply(handler, {"choices": []}),
        lambda handler: reply(handler, {"error": {"code": 502, "message": "no provider"}}),
        lambda handler: reply(handler, {"choices": [chat("4 or", "abort")]}),
        lambda handler: reply(handler, b"no gzip", content_encoding="gzip"),
        lambda handler: time.sleep(0.5),
    ],
    ids=[
        "hangs up",
        "breaks off",
        "busy",
        "too many",
        "no JSON",
        "no choices",
        "an error",
        "aborted",
        "garbled",
        "slow",
    ],
)
def test_a_failure_that_passes_is_outlasted(
    endpoint: Endpoint, failure: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    def answer(handler: BaseHTTPRequestHandler, body: Any, number: int) -> None:
        if number <= 2:
            failure(handler)
        else:
            reply(handler, {"choices": [chat("4")]})

    endpoint.answer = answer
    group = endpoint.sampler(timeout_seconds=0.3).sample([QUESTION], count=1, limits=Limits(2))[0]
    assert group[0].text == "4"
    assert len(endpoint.bodies) == 3


def test_a_server_that_drips_is_too_slow(endpoint: Endpoint) -> None:
    def answer(handler: BaseHTTPRequestHandler, body: Any, number: int) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    endpoint.answer = answer
    started = time.monotonic()
    with pytest.raises(EndpointError, match="no complete answer within"):
        endpoint.sampler(timeout_seconds=0.2, attempts=2).sample([QUESTION], count=1, limits=Limits(2))
    assert time.monotonic() - started < 3.0


def test_failures_for_good_say_what_to_do(endpoint: Endpoint) -> None:
    endpoint.answer = lambda handler, body, number: reply(handler, {"error": "no model tiny"}, 404)
    with pytest.raises(UserError, match=r"refused the request with HTTP 404.*no model tiny"):
        endpoint.sampler().sample([QUESTION], count=1, limits=Limits(2))
    assert len(endpoint.bodies) == 1  # what is wrong stays wrong
    with pytest.raises(UserError, match=r"failed 2 times.*Check that the server runs"):
        RemoteSampler("http://127.0.0.1:9/v1", "tiny", attempts=2, pause_seconds=0.01).sample(
            [QUESTION], count=1, limits=Limits(2)
        )
    endpoint.answer = lambda handler, body, number: reply(handler, {"result": 4})
    with pytest.raises(UserError, match="does not answer as OpenAI's interface"):
        endpoint.sampler().sample([QUESTION], count=1, limits=Limits(2))


@pytest.mark.parametrize("lie", [0.5, float("nan"), float("-inf"), "high"])
def test_impossible_logprobs_are_refused(endpoint: Endpoint, lie: Any) -> None:
    choice = chat("4", logprobs={"content": [{"token": "4", "logprob": lie}]}, token_ids=[5])
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [choice]})
    with pytest.raises(EndpointError, match="log-probability"):
        endpoint.sampler().sample([QUESTION], count=1, limits=Limits(2))


def test_prompts_that_are_alike_are_answered_apart(endpoint: Endpoint) -> None:
    sampler = endpoint.sampler()
    sampler.sample(
        [QUESTION, (Message("user", "3 + 3?"),), QUESTION, list(QUESTION)], count=1, limits=Limits(2, seed=3)
    )
    seeds = {body["seed"] for body in endpoint.bodies}
    assert len(seeds) == 4
    sampler.sample([QUESTION], count=1, limits=Limits(2, seed=3))
    assert endpoint.bodies[-1]["seed"] in seeds  # the first of them is asked as it is alone


def test_a_usage_that_is_none_is_passed_over(endpoint: Endpoint) -> None:
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [chat("4")], "usage": "free"})
    sampler = endpoint.sampler()
    assert sampler.sample([QUESTION], count=1, limits=Limits(2))[0][0].text == "4"
    assert (sampler.tokens_read, sampler.tokens_written) == (0, 0)


def test_a_choice_that_broke_off_is_asked_for_again(endpoint: Endpoint) -> None:
    answers = [[chat("one"), chat("tw", "error"), chat("three", "content_filter")], [chat("two")]]
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": answers[number - 1]})
    group = endpoint.sampler().sample([QUESTION], count=3, limits=Limits(2))[0]
    # what a filter stopped would be stopped again: it stays, marked
    assert [(c.text, c.stop) for c in group] == [("one", "end"), ("three", "error"), ("two", "end")]
    assert [body["n"] for body in endpoint.bodies] == [3, 1]


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": [{"type": "text", "text": "4"}]}, "finish_reason": "stop"},
        chat("4", token_ids=["token_id:4"]),
        chat("4", token_ids="ab"),
        chat("4", token_ids=[1.5]),
        chat("4", token_ids=[-1]),
    ],
    ids=["text in parts", "named tokens", "a text of tokens", "a fraction", "below 0"],
)
def test_what_is_no_text_and_no_tokens_is_refused(endpoint: Endpoint, choice: Any) -> None:
    endpoint.answer = lambda handler, body, number: reply(handler, {"choices": [choice]})
    with pytest.raises(EndpointError, match="does not answer as OpenAI's interface does"):
        endpoint.sampler().sample([QUESTION], count=1, limits=Limits(2))


def test_half_of_a_surrogate_pair_is_replaced(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda handler, body, number: reply(
        handler, b'{"choices": [{"text": "a \\ud83d b \\ud83d\\ude00"}]}'
    )
    (completion,) = endpoint.sampler().sample(["?"], count=1, limits=Limits(2))[0]
    assert completion.text == "a \ufffd b \U0001f600"
    assert write_jsonl(tmp_path / "kept.jsonl", [completion]) == 1
