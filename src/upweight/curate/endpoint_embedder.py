"""Vectors from a server that speaks OpenAI's embeddings interface: vLLM, Text Embeddings Inference, a service."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from upweight.core.errors import UserError
from upweight.curate.embed import Embedder
from upweight.rollout.service import Service

TEXTS_AT_ONCE = 64


class EndpointEmbedder(Embedder):
    """A model of a server.

    Args:
        base_url: up to and with "/v1".
        model: the name that the server knows it by.
        key_variable: the environment variable that holds the key; a server without keys needs none.
        attempts: how often a request is made; the pause before the second is `pause_seconds`, and doubles.

    Raises UserError where the server cannot be reached, and where its vectors are not all of one width.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        attempts: int = 5,
        pause_seconds: float = 1.0,
        timeout_seconds: float = 120.0,
    ) -> None:
        self._service = Service(
            base_url,
            key_variable=key_variable,
            timeout_seconds=timeout_seconds,
            attempts=attempts,
            pause_seconds=pause_seconds,
        )
        self._url, self._model = f"{self._service.base_url}/embeddings", model
        self.width = len(self._vectors(["width"])[0])

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "document width"]:
        """One row a text, of length 1; a row of zeros for a text without a word, which is not sent."""
        found = np.zeros((len(texts), self.width), np.float32)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            chosen = rows[start : start + TEXTS_AT_ONCE]
            vectors = np.asarray(self._vectors([texts[row] for row in chosen]), np.float32)
            if vectors.shape != (len(chosen), self.width) or not np.isfinite(vectors).all():
                raise UserError(f"{self._url} sent vectors of shape {vectors.shape} for {len(chosen)} texts")
            found[chosen] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return found

    def _vectors(self, texts: list[str]) -> list[list[float]]:
        with self._service.connected() as client:
            return self._service.ask(client, "embeddings", {"model": self._model, "input": texts}, self._read)

    def _read(self, reply: Any) -> list[list[float]]:
        try:
            ordered = sorted(reply["data"], key=lambda entry: int(entry["index"]))
            return [[float(value) for value in entry["embedding"]] for entry in ordered]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._url} does not answer as the embeddings interface does ({error}): {str(reply)[:200]}"
            ) from None
