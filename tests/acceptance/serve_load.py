"""`upweight serve` under load: the official client, 64 streams at once, cut connections, large and malformed requests.

    python tests/acceptance/serve_load.py MODEL [--streams 64]

Starts the server on a free port, does all of it, stops the server as Ctrl-C does while streams are running, and prints
what happened. Exits with 1 where anything is not as it has to be.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai

TEXTS = ["Mia has 3 pens and buys 4 more. How many?", "Say hello.", "What is 12 + 30?", "Name a colour."]


def stream(base: str, seed: int, tokens: int) -> tuple[str, float]:
    """One stream to its end: how it finished and the seconds to its first token."""
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=300)
    model = client.models.list().data[0].id
    began, first, finish = time.monotonic(), 0.0, ""
    asked = [{"role": "user", "content": TEXTS[seed % len(TEXTS)]}]
    for chunk in client.chat.completions.create(
        model=model, messages=asked, max_tokens=tokens, seed=seed, temperature=1.0, stream=True
    ):
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.monotonic() - began
        if chunk.choices and chunk.choices[0].finish_reason:
            finish = chunk.choices[0].finish_reason
    return finish or "no end", first


def many(base: str, count: int, tokens: int) -> Counter[str]:
    """So many streams at once; how they ended."""
    ends: Counter[str] = Counter()
    firsts: list[float] = []

    def one(seed: int) -> None:
        try:
            finish, first = stream(base, seed, tokens)
        except openai.OpenAIError as error:
            finish, first = type(error).__name__, 0.0
        ends[finish] += 1
        firsts.append(first)

    began = time.monotonic()
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    middle = sorted(firsts)[len(firsts) // 2]
    print(
        f"{count} streams of up to {tokens} tokens: {dict(ends)} in {took:.1f} s, first after {middle:.1f} s (median)"
    )
    return ends


def cut(base: str, count: int) -> None:
    """Streams that are left after a line or two."""
    body = {"messages": [{"role": "user", "content": "Count to a thousand."}], "stream": True, "max_tokens": 400}
    for index in range(count):
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=60) as reply:
            for line, _ in zip(range(1 + index % 3), reply.iter_lines(), strict=False):
                del line


def statuses(base: str) -> list[tuple[str, int]]:
    """What large and malformed requests are answered with."""
    url, kind = f"{base}/v1/chat/completions", {"Content-Type": "application/json"}
    random.seed(0)
    bodies = {
        "10 MB": b'{"messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}',
        "no JSON": b"{",
        "bytes": random.randbytes(1000),
        "empty": b"",
        "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "numbers": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400, "n": -1}',
        "wrong types": b'{"messages": {"role": 1}, "stream": "perhaps", "tools": 7}',
        "no message": b'{"messages": []}',
    }
    found = []
    for name, body in bodies.items():
        reply = httpx.post(url, content=body, headers=kind, timeout=60)
        assert "message" in reply.json()["error"], reply.text
        found.append((name, reply.status_code))
    with socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2])), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\n{"
        )  # and no more
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "upweight.cli", "serve", given.model, "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    base = f"http://127.0.0.1:{port}"
    faults = []
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                httpx.get(f"{base}/v1/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if server.poll() is not None or time.monotonic() > deadline:
                    print("the server did not start")
                    return 1
                time.sleep(0.5)
        ends = many(base, given.streams, given.tokens)
        if set(ends) - {"stop", "length"}:
            faults.append(f"streams ended with {dict(ends)}")
        cut(base, 20)
        told = statuses(base)
        print(", ".join(f"{name}: {status}" for name, status in told))
        faults += [f"{name} was answered with {status}" for name, status in told if not 400 <= status < 500]
        if set(many(base, 8, given.tokens)) - {"stop", "length"}:
            faults.append("it does not answer any more")
        status = Path(f"/proc/{server.pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        print(f"peak memory {int(resident.split()[1]) / 1e6:.2f} GB")
        body = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "max_tokens": 2000}
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=60) as reply:
            next(reply.iter_lines())
            began = time.monotonic()
            server.send_signal(signal.SIGINT)
            code = server.wait(30)
            print(f"stopped under a running stream in {time.monotonic() - began:.1f} s with exit code {code}")
            if code not in (0, 130):
                faults.append(f"it stopped with exit code {code}")
    finally:
        if server.poll() is None:
            server.kill()
    print(json.dumps({"faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
