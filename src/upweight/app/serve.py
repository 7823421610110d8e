"""HTTP: the OpenAI interface below /v1 with streaming, and a page to chat at /.

A request is bounded in size, length and time, and only so many are answered at once; it is refused, not queued without
end. The default address can be reached from this machine alone, under its own name: there is no password.
"""

import asyncio
import contextlib
import errno
import itertools
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from upweight.app.asked import Asked, ChatRequest, TextRequest
from upweight.app.engine import Engine, Piece, open_engine
from upweight.app.engine import Request as Answering
from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.work import Machine
from upweight.model.precision import Precision

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DRAINED_BYTES = 64 << 20
"""Of a request that is too large so much is read and thrown away, since most clients read an answer only after they
have sent all; one that sends still more is cut off."""
FINISH = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class ServeConfig:
    """Attributes:
    max_new_tokens: the longest answer that a request may ask for.
    concurrent: answers in the making or waiting for their turn; further requests get status 429.
    rows: answers decoded together; fewer where the memory for their context does not suffice.
    body_bytes: the largest request.
    seconds: the longest that an answer may take; it is then cut off.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_new_tokens: int = 2048
    concurrent: int = 128
    rows: int = 64
    body_bytes: int = 1_000_000
    seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"port is {self.port}: expected 1 to 65535, or 0 for any that is free")
        for name in ("max_new_tokens", "concurrent", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected at least 1")


class Refused(Exception):
    """A request that is answered with an error of the OpenAI interface."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def serve(given: str, *, root: Path, machine: Machine, config: ServeConfig, dtype: Precision | None = None) -> None:
    """Serve the model that `given` names until it is stopped; what is being answered may finish within seconds.

    Raises UserError where the address cannot be listened on, before the model is loaded.
    """
    if machine.threads:
        torch.set_num_threads(machine.threads)
    port = _free_port(config)
    engine = open_engine(given, root=root, device=machine.device, rows=min(config.rows, config.concurrent), dtype=dtype)
    weights = _files_of(find_model(given, root))
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"{given} at http://{host}:{port} (chat page) and http://{host}:{port}/v1", flush=True)
    app = make_app(engine, given, config, weights=weights)
    uvicorn.run(app, host=config.host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def _free_port(config: ServeConfig) -> int:
    """The port to listen on. Raises UserError where it is taken, or the address is none of this machine's."""
    found, trouble = 0, None
    try:
        for family, kind, *_, place in socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind) as trial:
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    trial.bind(place)
                    found = found or trial.getsockname()[1]
            except OSError as error:  # a name may have an address of a family that this machine does not use
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                trouble = error
        if trouble is not None and not found:
            raise trouble
    except OSError as error:
        raise UserError(
            f"{config.host}, port {config.port}, cannot be listened on ({error.strerror}): give another --port or "
            "--host"
        ) from None
    return found


def _files_of(directory: Path) -> str:
    """What changes when a file of the model does: names, sizes and times, since reading all weights takes a while."""
    found = [(file.name, file.stat()) for file in sorted(directory.iterdir()) if file.is_file()]
    return fingerprint([[name, status.st_size, status.st_mtime_ns] for name, status in found])


def make_app(engine: Engine, name: str, config: ServeConfig, *, weights: str = "") -> FastAPI:
    """The application around an engine; it closes the engine when it shuts down.

    Args:
        weights: what tells this model from another of the same name, for clients that keep answers.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="upweight", lifespan=life, docs_url=None, redoc_url=None)
    desk = _Desk(engine, name, config)
    if config.host in LOOPBACK:  # a page on the web must not reach us under a name of its own (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    app.add_middleware(_BoundedBody, most=config.body_bytes)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return files("upweight.app").joinpath("page.html").read_text()

    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "upweight", "fingerprint": weights}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> dict[str, Any]:
        desk.check_name(asked)
        return entry

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await desk.answer(asked, request)

    @app.post("/v1/completions")
    async def completions(asked: TextRequest, request: Request) -> Response:
        return await desk.answer(asked, request)

    return app


class _Desk:
    """Takes requests in, within the bounds, and writes the answers."""

    def __init__(self, engine: Engine, name: str, config: ServeConfig) -> None:
        self.engine, self.name, self.config = engine, name, config
        self._busy = 0
        self._unseeded = itertools.count(time.time_ns())

    def check_name(self, given: str) -> None:
        """Raises Refused where no model of that name is here."""
        if given != self.name:
            raise Refused(404, f"there is no model {given!r} here: it is called {self.name!r}", "model_not_found")

    async def answer(self, asked: Asked, request: Request) -> Response:
        if asked.model:
            self.check_name(asked.model)
        if self.engine.closed:
            raise Refused(503, "the model has stopped answering: start it again", "stopped")
        prompts = asked.prompts(self.engine.tokenizer)
        if self._busy + len(prompts) > self.config.concurrent:
            raise Refused(429, f"{self._busy} answers are being made; try again in a moment", "busy")
        room = self.engine.capacity - max(map(len, prompts))
        limits = [
            asked.limits(min(self.config.max_new_tokens, room), next(self._unseeded), index)
            for index in range(len(prompts))
        ]
        self._busy += len(prompts)
        made = _Made(len(prompts))
        try:
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
                submitted = self.engine.submit(
                    prompt,
                    limit,
                    made.deliver(index),
                    seconds=self.config.seconds,
                    alternatives=asked.alternatives if asked.wants_logprobs else 0,
                )
                made.requests.append(submitted)
        except BaseException:
            self._leave(made)
            raise
        head = {"id": f"{asked.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            return _Events(self._events(asked, made, head, sum(map(len, prompts))), lambda: self._leave(made))
        return await self._whole(asked, made, head, sum(map(len, prompts)), request)

    async def _events(self, asked: Asked, made: "_Made", head: Mapping[str, Any], read: int) -> AsyncIterator[str]:
        """Server-sent events: each piece as it comes."""
        tokenizer = self.engine.tokenizer
        written = 0
        gathered: list[list[Piece]] = [[] for _ in range(made.count)]
        for index in range(made.count):
            opening = asked.opening(index)
            if opening is not None:
                yield _event({**head, "object": asked.chunk_object, "choices": [opening]})
        async for index, piece in made.pieces():
            if piece.stop == "error":
                yield _event({"error": {"message": piece.error, "type": "server_error", "code": "stopped"}})
                break
            written += 1
            if asked.writes_whole:
                gathered[index].append(piece)
                if piece.stop:
                    choice = asked.whole_piece(index, gathered[index], FINISH[piece.stop], tokenizer)
                    yield _event({**head, "object": asked.chunk_object, "choices": [choice]})
            elif piece.text or piece.stop or asked.wants_logprobs:
                finish = FINISH[piece.stop] if piece.stop else None
                choice = asked.piece(index, piece, finish, tokenizer)
                yield _event({**head, "object": asked.chunk_object, "choices": [choice]})
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event({**head, "object": asked.chunk_object, "choices": [], "usage": _usage(read, written)})
        yield "data: [DONE]\n\n"

    async def _whole(
        self, asked: Asked, made: "_Made", head: Mapping[str, Any], read: int, request: Request
    ) -> Response:
        """One answer when all is made; broken off where the client hangs up."""
        gathered: list[list[Piece]] = [[] for _ in range(made.count)]
        watcher = asyncio.create_task(_hung_up(request, made))
        try:
            async for index, piece in made.pieces():
                if piece.stop == "error":
                    raise Refused(503, piece.error, "stopped")
                gathered[index].append(piece)
        finally:
            watcher.cancel()
            self._leave(made)
        choices = [
            asked.choice(index, pieces, FINISH[pieces[-1].stop or "length"], self.engine.tokenizer)
            for index, pieces in enumerate(gathered)
            if pieces
        ]
        usage = _usage(read, sum(map(len, gathered)))
        return JSONResponse({**head, "object": asked.object, "choices": choices, "usage": usage})

    def _leave(self, made: "_Made") -> None:
        for request in made.requests:
            request.cancel()
        self._busy -= made.count


class _Events(StreamingResponse):
    """A stream whose places are free again however it ends, also where the client has left before its first byte: then
    the events are never begun, and no `finally` of theirs would run."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


class _Made:
    """The pieces of one request's answers, on their way from the engine's thread to the event loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.requests: list[Answering] = []
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()

    def deliver(self, index: int) -> Callable[[Piece], None]:
        def put(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))

        return put

    def break_off(self) -> None:
        """End the iteration of `pieces`: nobody reads them."""
        self._arrived.put_nowait(None)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(answer, piece) as they come, until all answers have ended."""
        left = self.count
        while left:
            item = await self._arrived.get()
            if item is None:
                return
            yield item
            left -= item[1].stop is not None


async def _hung_up(request: Request, made: _Made) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    made.break_off()


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _error(status: int, message: str, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, error.message, error.code)


async def _user_error(request: Request, error: Exception) -> Response:
    return _error(400, str(error), "invalid_request")


async def _defect(request: Request, error: Exception) -> Response:
    """A fault of ours, in the interface's form; the server writes its traceback to the terminal."""
    return _error(500, f"{type(error).__name__}: the server could not answer this request", "stopped")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), "invalid_request" if error.status_code < 500 else "stopped")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, item['loc'][1:])) or 'body'}: {item['msg']}" for item in error.errors()[:5])
    return _error(400, told, "invalid_request")


class _BoundedBody:
    """Refuses a body above `most` bytes before it is read whole, whatever its headers say."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = _error(413, f"a request holds at most {self.most:,} bytes", "too_large")
        if not declared.isdigit() or int(declared) > self.most + DRAINED_BYTES:
            await too_large(scope, receive, send)
            return
        body, size, more = bytearray(), 0, scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(piece)
            if size <= self.most:
                body += piece
            elif size > self.most + DRAINED_BYTES:
                break
        if size > self.most:
            await too_large(scope, receive, send)
            return
        given = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Any:
            return next(given, None) or await receive()

        await self.app(scope, replay, send)
