"""A JSON interface over HTTP, asked with patience.

A request that is refused for load, breaks off or takes too long is made again after a pause that doubles; one that the
server calls wrong is not.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from upweight.core.errors import UserError

LARGEST_REPLY_BYTES = 64 << 20
LONGEST_PAUSE_SECONDS = 30.0
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)

Read = TypeVar("Read")


class EndpointError(UserError):
    """The endpoint did not answer, or not as agreed."""


class Unfit(Exception):
    """An answer that another attempt may better."""

    def __init__(self, reason: str, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class Service:
    """Where a server is and how patiently it is asked.

    Args:
        base_url: up to and with "/v1".
        key_variable: the environment variable that holds the key; a server without keys needs none.
        timeout_seconds: of one request, from start to end.
        attempts: how often a request is made before it is given up.
        pause_seconds: before the second attempt; doubled before each further one.
        most_in_flight: requests at once.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout_seconds: float = 600.0,
        attempts: int = 5,
        pause_seconds: float = 1.0,
        most_in_flight: int = 32,
    ) -> None:
        if attempts < 1 or most_in_flight < 1:
            raise ValueError(f"{attempts} attempts and {most_in_flight} requests in flight: at least one of each")
        self.base_url = base_url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.attempts = attempts
        self.pause_seconds = pause_seconds
        self.most_in_flight = most_in_flight
        key = os.environ.get(key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @contextmanager
    def connected(self) -> Iterator[httpx.Client]:
        """Connections for requests, as many as may be in flight."""
        bound = httpx.Limits(max_connections=self.most_in_flight)
        timeout = httpx.Timeout(self.timeout_seconds, pool=None)
        with httpx.Client(headers=self._headers, limits=bound, timeout=timeout) as client:
            yield client

    def ask(self, client: httpx.Client, path: str, body: Mapping[str, Any], read: Callable[[Any], Read]) -> Read:
        """What `read` makes of the answer to a POST of `body`. Where it raises Unfit, the request is made again.

        Raises EndpointError where the last attempt fails, or the server refuses the request itself.
        """
        pause = self.pause_seconds
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
                pause *= 2
            try:
                return read(self._reply(client, path, body))
            except Unfit as error:
                reason = str(error)
                pause = max(pause, error.pause_seconds)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
        raise EndpointError(
            f"{self.base_url}/{path} failed {self.attempts} times, at last with: {reason}. Check that the server runs "
            "and serves this model; raise timeout_seconds or lower most_in_flight where it is slow"
        )

    def _reply(self, client: httpx.Client, path: str, body: Mapping[str, Any]) -> Any:
        """The parsed answer, read against a deadline: a server that drips bytes is too slow as well."""
        deadline = time.monotonic() + self.timeout_seconds
        data = bytearray()
        with client.stream("POST", f"{self.base_url}/{path}", json=body) as response:
            for piece in response.iter_bytes():
                data += piece
                if time.monotonic() > deadline:
                    raise Unfit(f"no complete answer within {self.timeout_seconds:g} s")
                if len(data) > LARGEST_REPLY_BYTES:
                    raise EndpointError(f"{self.base_url}/{path} sent more than {LARGEST_REPLY_BYTES >> 20} MB")
            shown = data[:500].decode(errors="replace")
            if response.status_code in _AGAIN:
                raise Unfit(f"HTTP {response.status_code}: {shown}", _retry_after(response))
            if response.status_code != 200:
                raise EndpointError(
                    f"{self.base_url}/{path} refused the request with HTTP {response.status_code}: {shown}"
                )
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"an answer that is no JSON: {shown[:200]}") from error


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0  # a date: the doubling pause has to do
