import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.curate.endpoint_embedder import EndpointEmbedder


class Handler(BaseHTTPRequestHandler):
    """Vectors (length of the text, 1, 0), in reverse order; each second request is refused for load."""

    requests = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.requests += 1
        if "broken" in body["input"]:
            reply: dict[str, Any] = {"error": "no such model"}
        else:
            data = [{"index": i, "embedding": [len(text), 1, 0]} for i, text in enumerate(body["input"])]
            reply = {"data": data[::-1]}
        self.send_response(503 if Handler.requests % 2 else 200)
        packed = json.dumps(reply).encode()
        self.send_header("Content-Length", str(len(packed)))
        self.end_headers()
        self.wfile.write(packed)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def test_vectors_of_a_server_are_put_in_order_and_scaled(url: str) -> None:
    embedder = EndpointEmbedder(url, "small", pause_seconds=0.01)
    assert embedder.width == 3
    found = embedder.embed(["abc", "  ", "a"])
    # (3, 1, 0) / sqrt(10), nothing, (1, 1, 0) / sqrt(2)
    np.testing.assert_allclose(found, [[0.948683, 0.316228, 0], [0, 0, 0], [0.707107, 0.707107, 0]], atol=1e-6)
    with pytest.raises(UserError, match="does not answer as the embeddings interface does"):
        embedder.embed(["broken"])


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1/embeddings failed 2 times"):
        EndpointEmbedder("http://127.0.0.1:9/v1", "small", attempts=2, pause_seconds=0.01)
