"""What a teacher says along known responses, on disk: its likeliest tokens at each place, and what all others have.

A directory holds parts, each a directory of its own that is complete once its meta.json is there:

meta.json      format, vocabulary, kept, temperature, counts, and who the teacher was
keys.bin       16 bytes a response: a hash of the prompt's and the response's tokens, by which it is found
offsets.bin    int64, responses + 1: where the places of each response begin
lengths.bin    uint32, tokens of each response
places.bin     uint32: which token of its response each place is (all of them, unless two tokenizers were aligned)
tokens.bin     uint16 where the vocabulary fits and uint32 where not, [place, kept]
logprobs.bin   float16, nats, [place, kept]
rest.bin       float32, nats: the log-probability of all tokens that are not kept, together

With 32 tokens kept that is 136 bytes a place, or 200 for a vocabulary above 65,536. Rounding to float16 moves a
log-probability of -1 by 0.0005 at most; whoever reads scales the probabilities to a sum of 1 again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from upweight.core.errors import UserError
from upweight.store.artifact import write_whole

FORMAT = 1
META = "meta.json"
SMALL_VOCABULARY = 1 << 16
KEY_BYTES = 16


class Stored(NamedTuple):
    """What is stored of one response.

    Attributes:
        tokens, logprobs: the likeliest tokens at each place, in nats.
        rest: the log-probability of all other tokens together.
        taught: which of the response's tokens have a place.
    """

    tokens: Int64[np.ndarray, "place kept"]
    logprobs: Float32[np.ndarray, "place kept"]
    rest: Float32[np.ndarray, " place"]
    taught: Bool[np.ndarray, " token"]


class SignalWriter:
    """Writes one part, response by response. What an earlier writer left in the directory is overwritten.

    Args:
        vocabulary: token ids lie below it.
        kept: tokens at each place.
        teacher: whatever says who the teacher was, as plain JSON.
    """

    def __init__(self, directory: Path, *, vocabulary: int, kept: int, temperature: float, teacher: Any) -> None:
        if not 0 < kept < vocabulary:
            raise UserError(f"{kept} tokens of a vocabulary of {vocabulary} are to be kept: expected 1 to all but one")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / META).unlink(missing_ok=True)
        self.directory = directory
        self._meta = {
            "format": FORMAT,
            "vocabulary": vocabulary,
            "kept": kept,
            "temperature": temperature,
            "teacher": teacher,
        }
        self._files = {name: (directory / name).open("wb") for name in _ARRAYS}
        self._put("offsets.bin", np.int64(0))
        self.responses = self.places = 0

    def write(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        tokens: Int[np.ndarray, "place kept"],
        logprobs: Float[np.ndarray, "place kept"],
        rest: Float[np.ndarray, " place"],
        places: Sequence[int] | None = None,
    ) -> None:
        """Append one response.

        Args:
            places: which tokens of the response the rows are for; None where there is one for each.

        Raises UserError where a number is NaN or above 0, or a token outside the vocabulary.
        """
        where = np.arange(len(response)) if places is None else np.asarray(places, dtype=np.int64)
        vocabulary, kept = self._meta["vocabulary"], self._meta["kept"]
        if tokens.shape != (len(where), kept) or logprobs.shape != tokens.shape or rest.shape != where.shape:
            raise ValueError(f"{len(where)} places of {kept} tokens each, but arrays of {tokens.shape}, {rest.shape}")
        if len(where) and (tokens.min() < 0 or tokens.max() >= vocabulary):
            raise UserError(
                f"the teacher names token {int(tokens.max())}, but the student's vocabulary has {vocabulary}: it "
                "reads with another tokenizer"
            )
        # a probability a hair above 1 is rounding
        if not (np.isfinite(logprobs).all() and (logprobs <= 1e-3).all() and (rest <= 1e-3).all()):
            raise UserError("the teacher gives NaN or infinite log-probabilities: look at its weights and precision")
        self.responses += 1
        self.places += len(where)
        self._put("keys.bin", np.frombuffer(_key(prompt, response), dtype=np.uint8))
        self._put("offsets.bin", np.int64(self.places))
        self._put("lengths.bin", np.uint32(len(response)))
        self._put("places.bin", where.astype(np.uint32))
        self._put("tokens.bin", tokens.astype(_token_dtype(vocabulary)))
        self._put("logprobs.bin", np.minimum(logprobs, 0).astype(np.float16))
        self._put("rest.bin", np.clip(rest, LEAST, 0).astype(np.float32))

    def _put(self, name: str, values: Any) -> None:
        self._files[name].write(values.tobytes())

    def close(self) -> None:
        """The part exists from here on."""
        for file in self._files.values():
            file.close()
        write_whole(
            self.directory / META,
            json.dumps({**self._meta, "responses": self.responses, "places": self.places}, indent=1),
        )


class Signal:
    """A stored teacher, found by the tokens of a response.

    Attributes:
        vocabulary, kept, temperature, teacher: as it was written.
        responses, places: counts.
    """

    def __init__(self, parts: Sequence["_Part"]) -> None:
        first = parts[0].meta
        self.vocabulary: int = first["vocabulary"]
        self.kept: int = first["kept"]
        self.temperature: float = first["temperature"]
        self.teacher: Any = first["teacher"]
        self.responses = sum(part.meta["responses"] for part in parts)
        self.places = sum(part.meta["places"] for part in parts)
        self._parts = parts
        self._where: dict[bytes, tuple[int, int]] = {}
        for number, part in enumerate(parts):
            keys = part.arrays["keys.bin"].tobytes()
            for index in range(part.meta["responses"]):
                self._where[keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]] = (number, index)

    @classmethod
    def open(cls, directory: Path) -> "Signal":
        """All parts below `directory`. Raises UserError where there is none, and where one is damaged."""
        metas = sorted(directory.glob(f"*/{META}"))
        if not metas:
            raise UserError(f"{directory} holds no stored teacher: run the teach step again")
        parts = [_open(path.parent) for path in metas]
        said = {json.dumps([part.meta[name] for name in _SHARED]) for part in parts}
        if len(said) > 1:
            raise UserError(f"the parts of {directory} are of different teachers or settings: run teach again")
        return cls(parts)

    def read(self, prompt: Sequence[int], response: Sequence[int]) -> Stored:
        """What is stored of one response. Raises UserError where it is not known."""
        found = self._where.get(_key(prompt, response))
        if found is None:
            raise UserError(
                f"the stored teacher says nothing of a response of {len(response)} tokens after a prompt of "
                f"{len(prompt)}: it was stored for other pairs, or with another tokenizer or chat template. Run teach "
                "on these pairs with the student that is to be trained"
            )
        part, index = self._parts[found[0]], found[1]
        arrays = part.arrays
        first, last = (int(place) for place in arrays["offsets.bin"][index : index + 2])
        taught = np.zeros(int(arrays["lengths.bin"][index]), dtype=bool)
        taught[arrays["places.bin"][first:last]] = True
        return Stored(
            arrays["tokens.bin"][first:last].astype(np.int64),
            arrays["logprobs.bin"][first:last].astype(np.float32),
            arrays["rest.bin"][first:last].astype(np.float32),
            taught,
        )


class _Part(NamedTuple):
    meta: dict[str, Any]
    arrays: dict[str, Any]


LEAST = -80.0
"""Nats: what the tokens that are not kept have at least, so that float32 can take its exponential."""

_SHARED = ("vocabulary", "kept", "temperature", "teacher")
_ARRAYS = ("keys.bin", "offsets.bin", "lengths.bin", "places.bin", "tokens.bin", "logprobs.bin", "rest.bin")


def _open(directory: Path) -> _Part:
    path = directory / META
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{path} is of format {meta['format']}, this version reads {FORMAT}: run teach again")
        counts, places, kept = meta["responses"], meta["places"], meta["kept"]
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "keys.bin": (np.uint8, (counts, KEY_BYTES)),
            "offsets.bin": (np.int64, (counts + 1,)),
            "lengths.bin": (np.uint32, (counts,)),
            "places.bin": (np.uint32, (places,)),
            "tokens.bin": (_token_dtype(meta["vocabulary"]), (places, kept)),
            "logprobs.bin": (np.float16, (places, kept)),
            "rest.bin": (np.float32, (places,)),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): run the teach step again") from None
    arrays = {}
    for name, (kind, form) in kinds.items():
        file = directory / name
        expected = int(np.prod(form)) * np.dtype(kind).itemsize
        size = file.stat().st_size if file.exists() else -1
        if size != expected:
            raise UserError(f"{file} has {size:,} bytes instead of {expected:,}: it is damaged, run teach again")
        arrays[name] = np.memmap(file, kind, "r", shape=form) if expected else np.empty(form, kind)
    return _Part(meta, arrays)


def _key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    told = np.asarray([len(prompt), *prompt, *response], dtype=np.int64).tobytes()
    return hashlib.sha256(told).digest()[:KEY_BYTES]


def _token_dtype(vocabulary: int) -> Any:
    return np.dtype(np.uint16 if vocabulary <= SMALL_VOCABULARY else np.uint32)
