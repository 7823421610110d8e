"""Several token sequences in one row: how they are placed, and the batch that comes of it.

A sequence t_0 ... t_{n-1} becomes a strip of n places: place j reads t_j and predicts t_{j+1}. Its last place predicts
nothing, unless the strip is a piece of a longer document whose next token is known.

Several continuations of one prompt can share it: see `bundles`.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64

from upweight.core.batches import PADDING, TokenBatch


class Strip(NamedTuple):
    """One sequence ready to be laid into a row: three arrays of one length, as in TokenBatch."""

    tokens: Int64[np.ndarray, " n"]
    targets: Int64[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]


def strip(tokens: Sequence[int], trained: Sequence[bool] | Sequence[float]) -> Strip:
    """A whole sequence. `trained[i]` is the loss weight of predicting token i; that of the first token is not used."""
    if len(tokens) != len(trained):
        raise ValueError(f"{len(tokens)} tokens but {len(trained)} loss weights: expected one each")
    read = np.asarray(tokens, dtype=np.int64)
    targets, weights = np.zeros(len(read), np.int64), np.zeros(len(read), np.float32)
    targets[:-1] = read[1:]
    weights[:-1] = np.asarray(trained, dtype=np.float32)[1:]
    return Strip(read, targets, weights)


class Continuation(NamedTuple):
    """What follows a prompt, with the loss weight of predicting each of its tokens."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    weights: Sequence[float]


def branches(prompt: Sequence[int], continuations: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[Strip]:
    """Continuations of one prompt that read it once: a strip of the prompt, then one for each of them.

    The last token of the prompt predicts the first of each continuation, so it opens every strip but that of the
    prompt, which ends before it. Lay them with `follows` naming the first strip for all others.

    Args:
        prompt: two tokens or more.
        continuations: the tokens of each, and the loss weights of predicting them.
    """
    if len(prompt) < 2:
        raise ValueError(f"a prompt of {len(prompt)} tokens cannot be shared: at least two are needed")
    return [
        strip(prompt[:-1], [0.0] * (len(prompt) - 1)),
        *(strip((prompt[-1], *tokens), (0.0, *weights)) for tokens, weights in continuations),
    ]


def bundles(items: Sequence[Continuation], most: int) -> list[list[int]]:
    """Neighbours with one prompt together, which they then share: as many as take at most `most` places."""
    found: list[list[int]] = []
    for index, item in enumerate(items):
        last = [items[other] for other in found[-1]] if found else []
        if last and last[0].prompt == item.prompt and len(item.prompt) > 1 and places_of([*last, item]) <= most:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def places_of(bundle: Sequence[Continuation]) -> int:
    """Places that a bundle takes: a lone continuation its prompt too, several share the prompt's all but last token."""
    if len(bundle) == 1:
        return len(bundle[0].prompt) + len(bundle[0].tokens)
    return len(bundle[0].prompt) - 1 + sum(1 + len(item.tokens) for item in bundle)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's lengths summing to at most `capacity`.

    Best fit decreasing: the longest first, each into the row that it leaves the least space in. Deterministic.
    Raises ValueError where a length exceeds the capacity.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sequence of {length} tokens does not fit a row of {capacity}")
        place = bisect.bisect_left(spaces, (length, -1))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > length:
            bisect.insort(spaces, (space - length, row))
    return rows


def lay(
    strips: Sequence[Strip],
    rows: Sequence[Sequence[int]],
    time: int = 0,
    *,
    follows: Mapping[int, int] | None = None,
) -> TokenBatch:
    """The batch whose row r holds the strips `rows[r]` side by side. The segment of a token is its strip's index.

    Args:
        time: places of a row; 0 takes as many as the fullest row needs.
        follows: which strip another one continues: it may attend to that strip, and its positions go on from there.
            That strip stands before it in its row, with nothing between them but others that continue it too.
    """
    follows = follows or {}
    width = time or max((sum(len(strips[index].tokens) for index in row) for row in rows), default=1)
    shape = (max(1, len(rows)), max(1, width))
    tokens, targets, positions = (np.zeros(shape, np.int64) for _ in range(3))
    segments, prefixes = np.full(shape, PADDING, np.int64), np.full(shape, PADDING, np.int64)
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        shared = None
        for index in row:
            part, prefix = strips[index], follows.get(index, index)
            if prefix == index:
                shared = index
            elif prefix != shared:
                raise ValueError(f"strip {index} continues strip {prefix}, which does not stand before it in row {r}")
            end = start + len(part.tokens)
            if end > shape[1]:
                raise ValueError(f"row {r} holds more than {shape[1]} tokens")
            tokens[r, start:end], targets[r, start:end], weights[r, start:end] = part
            first = 0 if prefix == index else len(strips[prefix].tokens)
            positions[r, start:end] = np.arange(first, first + end - start)
            segments[r, start:end], prefixes[r, start:end] = index, prefix
            start = end
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        prefixes=torch.from_numpy(prefixes) if follows else None,
    )


def pack(strips: Sequence[Strip], capacity: int) -> TokenBatch:
    """All strips in one batch of few rows: as many as best fit needs at `capacity` places (or at as many as the longest
    strip takes), and these as short as they can be, since what no strip fills is padding that costs like any token."""
    lengths = [len(part.tokens) for part in strips]
    most = max(lengths, default=1)
    widest = max(capacity, most)
    rows = best_fit(lengths, widest)
    narrowest = max(most, math.ceil(sum(lengths) / max(1, len(rows))))
    while narrowest < widest:
        tried = best_fit(lengths, (narrowest + widest) // 2)
        if len(tried) <= len(rows):
            rows, widest = tried, (narrowest + widest) // 2
        else:
            narrowest = (narrowest + widest) // 2 + 1
    return lay(strips, rows)


def pack_bundles(
    parts: Sequence[Sequence[Continuation]], capacity: int = 1
) -> tuple[TokenBatch, Int64[np.ndarray, " item"]]:
    """The continuations of all bundles in one batch, and which sequence each of them is.

    Where a prompt is shared all stand in one row: attention costs no more there, and no place is padding. Otherwise
    they are packed into rows of `capacity` places, or of as many as the longest takes where that is more.
    """
    strips: list[Strip] = []
    follows: dict[int, int] = {}
    sequences: list[int] = []
    for part in parts:
        first = len(strips)
        if len(part) == 1:
            ((prompt, tokens, weights),) = part
            strips.append(strip((*prompt, *tokens), (*[0.0] * len(prompt), *weights)))
            sequences.append(first)
            continue
        strips += branches(part[0].prompt, [(item.tokens, item.weights) for item in part])
        sequences += range(first + 1, len(strips))
        follows |= dict.fromkeys(range(first + 1, len(strips)), first)
    batch = lay(strips, [list(range(len(strips)))], follows=follows) if follows else pack(strips, capacity)
    return batch, np.array(sequences, dtype=np.int64)
