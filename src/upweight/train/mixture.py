"""The pretraining loader: documents drawn from pools in the shares that the timeline asks for, counted to the token.

Each pool is a stream: its documents in an order shuffled over the whole pool, anew for each epoch. The state of a
stream is three integers (epoch, place in the order, tokens of that document already read), so nothing is read twice or
skipped.

After every step the tokens taken from a pool within the phase are its share of the phase's tokens so far. Documents are
taken whole (`whole_documents`), so a pool may run ahead or behind by half a row's worth; the last step of a phase cuts
the last documents so that the phase ends exactly. Without `whole_documents` the shares are exact at every step.

Documents longer than a row are cut at the row's length. Rows are filled by best fit. Each piece is a segment of its
own: its positions start at 0 and it attends to itself alone. The token after a cut is still predicted from the last one
before it, so every token of a document but its first is trained on exactly once an epoch, however rows fall.
"""

import bisect
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from upweight.core.batches import TokenBatch
from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.packing import Strip, best_fit, lay
from upweight.store.shards import Shards
from upweight.train.batching import Loader, divided
from upweight.train.parallel import World, readers
from upweight.train.shuffle import shuffled
from upweight.train.timeline import Setting, Timeline

Ledger = dict[str, dict[str, dict[str, int]]]
"""Tokens by phase, pool and source."""


class Account(NamedTuple):
    """What tokens are counted by: where in training, and where they come from. Epochs of a pool count from 0."""

    phase: str
    pool: str
    epoch: int
    tier: str
    source: str


class Piece(NamedTuple):
    """Tokens `start` to `end` of one document of a pool, in an epoch of it."""

    pool: str
    document: int
    start: int
    end: int
    epoch: int = 0

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.end - self.start


@dataclass
class Stream:
    """How far a pool has been read: the epoch, the place in its order, the tokens already read of that document."""

    epoch: int = 0
    place: int = 0
    offset: int = 0


@dataclass
class MixtureState:
    """The whole state of a MixtureLoader.

    Attributes:
        consumed: tokens read so far, the place on the timeline.
        streams: how far each pool has been read.
        accounts: tokens read so far, by everything that they are counted by.
    """

    consumed: int = 0
    streams: dict[str, Stream] = field(default_factory=dict)
    accounts: dict[Account, int] = field(default_factory=dict)


class MixtureLoader(Loader):
    """Rows of packed documents. The timeline's unit is the token.

    Args:
        pools: token shards by the names that the timeline's mixtures use.
        timeline: checked against the pools before anything is trained.
        batch_tokens: of one optimizer step, over all processes; the steps of a phase are made equally long, so the last
            is no stump, and longer than this by a row at most.
        microbatch_tokens: of one forward pass.
        most_epochs: how often a pool may be repeated. A timeline that needs more is refused.
        whole_documents: never cut a document that fits a row, and let rows end in padding instead. Without it every row
            is full and documents are cut where a row ends.
    """

    def __init__(
        self,
        pools: Mapping[str, Shards],
        timeline: Timeline,
        *,
        seed: int,
        batch_tokens: int,
        microbatch_tokens: int,
        most_epochs: float = 4.0,
        whole_documents: bool = True,
        place: World | None = None,
    ) -> None:
        _check(pools, timeline, batch_tokens, most_epochs)
        self.pools, self.timeline, self.seed = pools, timeline, seed
        self.batch_tokens, self.microbatch_tokens = batch_tokens, microbatch_tokens
        self.whole_documents = whole_documents
        self._world = place or readers()
        self._state = MixtureState(streams={name: Stream() for name in pools})
        self._had: Counter[tuple[str, str]] = Counter()  # tokens by phase and pool, the sums of the accounts
        self._last: list[Piece] = []

    @property
    def consumed(self) -> int:
        return self._state.consumed

    @property
    def vocab_size(self) -> int:
        return max(pool.vocab_size for pool in self.pools.values())

    def state(self) -> dict[str, Any]:
        return {
            "consumed": self._state.consumed,
            "streams": {name: dataclasses.asdict(stream) for name, stream in self._state.streams.items()},
            "accounts": [[*account, tokens] for account, tokens in self._state.accounts.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        streams = {name: Stream(**stream) for name, stream in state["streams"].items()}
        accounts = {Account(*account): tokens for *account, tokens in state["accounts"]}
        self._state = MixtureState(state["consumed"], streams, accounts)
        self._had = Counter()
        for account, tokens in accounts.items():
            self._had[account.phase, account.pool] += tokens

    def identity(self) -> Mapping[str, Any]:
        return {
            "pools": {name: [len(pool), pool.tokens, pool.vocab_size] for name, pool in self.pools.items()},
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "whole_documents": self.whole_documents,
        }

    def shares(self) -> Mapping[str, float]:
        """The share of each pool in the last step's tokens."""
        tokens = Counter[str]()
        for piece in self._last:
            tokens[piece.pool] += piece.length
        return {pool: tokens[pool] / tokens.total() for pool in sorted(self.pools)} if tokens else {}

    def documents(self) -> Sequence[str]:
        return [self.pools[piece.pool].document_id(piece.document) for piece in self._last]

    def accounts(self) -> Mapping[Account, int]:
        """Tokens consumed so far by phase, pool, epoch, tier and source."""
        return self._state.accounts

    def ledger(self) -> Ledger:
        """The accounts summed up by phase, pool and source."""
        summed: Ledger = {}
        for account, tokens in self._state.accounts.items():
            by_source = summed.setdefault(account.phase, {}).setdefault(account.pool, {})
            by_source[account.source] = by_source.get(account.source, 0) + tokens
        return summed

    def next(self, setting: Setting) -> Sequence[TokenBatch]:
        if setting.context < 1:
            raise UserError(f"phase {setting.phase!r} has no context: give the tokens of a row")
        pieces = self._draw(setting)
        self._count(setting.phase, pieces)
        self._last = pieces
        if self.whole_documents:
            rows = [
                [pieces[index] for index in row]
                for row in best_fit([piece.length for piece in pieces], setting.context)
            ]
        else:
            rows = filled(pieces, setting.context)
        most = max(1, self.microbatch_tokens // setting.context)
        return [self._batch(part, setting.context) for part in divided(rows, self._world, most)]

    def _draw(self, setting: Setting) -> list[Piece]:
        """The pieces of one step: each pool up to its share of the phase's tokens at the step's end."""
        slack = setting.context if self.whole_documents else 0  # a step that ran short does not make one step more
        steps = max(1, math.ceil((setting.remaining - slack) / self.batch_tokens))
        tokens = math.ceil(setting.remaining / steps)
        wanted = quotas(setting.mixture, setting.passed + tokens)
        due = {pool: amount - self._had[setting.phase, pool] for pool, amount in wanted.items()}
        exact = not self.whole_documents or tokens == setting.remaining
        if exact:
            due = _settled(due)
        pieces = []
        for pool, amount in due.items():
            while amount > 0:
                most = min(setting.context, amount) if exact else setting.context
                ahead = self._ahead(pool, most)
                if not exact and ahead.length > 2 * amount:
                    break
                pieces.append(self._take(ahead))
                amount -= ahead.length
        if not pieces:  # every pool is owed less than half a document: the one that is owed most goes first
            pieces.append(self._take(self._ahead(max(due, key=lambda pool: due[pool]), setting.context)))
        return pieces

    def _ahead(self, pool: str, most: int) -> Piece:
        """The next piece of a pool, of at most `most` tokens."""
        stream = self._state.streams[pool]
        shards = self.pools[pool]
        key = seed_for(self.seed, pool, stream.epoch)
        document = shuffled(stream.place, len(shards), key)
        end = min(stream.offset + most, shards.length(document))
        return Piece(pool, document, stream.offset, end, stream.epoch)

    def _take(self, piece: Piece) -> Piece:
        stream, shards = self._state.streams[piece.pool], self.pools[piece.pool]
        stream.offset = piece.end
        if piece.end == shards.length(piece.document):
            stream.place, stream.offset = stream.place + 1, 0
            if stream.place == len(shards):
                stream.epoch, stream.place = stream.epoch + 1, 0
        return piece

    def _count(self, phase: str, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            group = self.pools[piece.pool].group(piece.document)
            account = Account(phase, piece.pool, piece.epoch, group.tier, group.source)
            self._state.accounts[account] = self._state.accounts.get(account, 0) + piece.length
            self._state.consumed += piece.length
            self._had[phase, piece.pool] += piece.length

    def _batch(self, rows: Sequence[Sequence[Piece]], context: int) -> TokenBatch:
        strips: list[Strip] = []
        places: list[list[int]] = []
        for row in rows:
            places.append(list(range(len(strips), len(strips) + len(row))))
            strips += [self._strip(piece) for piece in row]
        return lay(strips, places, context)

    def _strip(self, piece: Piece) -> Strip:
        read = self.pools[piece.pool].sequence(piece.document, piece.start, piece.end + 1)
        count = piece.length
        targets, weights = np.zeros(count, np.int64), np.zeros(count, np.float32)
        targets[: len(read) - 1] = read[1:]
        weights[: len(read) - 1] = 1.0
        return Strip(read[:count], targets, weights)


def quotas(mixture: Mapping[str, float], tokens: int) -> dict[str, int]:
    """Whole tokens of each pool that make up `tokens` in the mixture's shares: largest remainders, ties by name."""
    exact = {pool: share * tokens for pool, share in mixture.items()}
    whole = {pool: math.floor(amount) for pool, amount in exact.items()}
    spare = tokens - sum(whole.values())
    order = sorted(exact, key=lambda pool: (whole[pool] - exact[pool], pool))
    for index in range(abs(spare)):
        whole[order[index % len(order)]] += 1 if spare > 0 else -1
    return whole


def _settled(due: Mapping[str, int]) -> dict[str, int]:
    """What is due without negative amounts: what one pool has had too much is taken from those that are owed most."""
    settled = {pool: max(0, amount) for pool, amount in due.items()}
    excess = sum(settled.values()) - sum(due.values())
    for pool in sorted(settled, key=lambda pool: (-settled[pool], pool)):
        less = min(excess, settled[pool])
        settled[pool] -= less
        excess -= less
    return settled


def filled(pieces: Sequence[Piece], context: int) -> list[list[Piece]]:
    """Rows of exactly `context` tokens but for the last: the longest piece that fits, and where none fits the longest
    one is cut at the row's end."""
    waiting = sorted(pieces, key=lambda piece: piece.length)
    lengths = [piece.length for piece in waiting]
    rows: list[list[Piece]] = []
    while waiting:
        row: list[Piece] = []
        space = context
        while space and waiting:
            place = bisect.bisect_right(lengths, space) - 1
            piece = waiting.pop(place)  # place -1, the longest, where none fits
            lengths.pop(place)
            if piece.length > space:
                rest = piece._replace(start=piece.start + space)
                piece = piece._replace(end=rest.start)
                back = bisect.bisect_left(lengths, rest.length)
                waiting.insert(back, rest)
                lengths.insert(back, rest.length)
            row.append(piece)
            space -= piece.length
        rows.append(row)
    return rows


def _check(pools: Mapping[str, Shards], timeline: Timeline, batch_tokens: int, most_epochs: float) -> None:
    for phase in timeline.phases:
        if not phase.mixture:
            raise UserError(f"phase {phase.name!r} has no mixture: give the share of each of {sorted(pools)}")
        unknown = sorted(set(phase.mixture) - set(pools))
        if unknown:
            raise UserError(f"phase {phase.name!r} mixes {unknown}, but there are only {sorted(pools)}")
        if not 0 < phase.context <= batch_tokens:
            raise UserError(
                f"phase {phase.name!r} has rows of {phase.context} tokens in steps of {batch_tokens}: "
                "a step holds at least one row"
            )
    for pool, needed in timeline.needed().items():
        available = pools[pool].tokens * most_epochs
        if math.floor(needed) > available:
            largest = max(timeline.phases, key=lambda phase: phase.mixture.get(pool, 0) * phase.tokens).name
            raise UserError(
                f"the timeline needs {needed:,.0f} tokens of {pool!r} (most in phase {largest!r}), "
                f"but it has {pools[pool].tokens:,}, and {most_epochs:g} epochs of them are {available:,.0f}: "
                f"{needed - available:,.0f} are missing. Add documents, allow more epochs, or shorten the phase"
            )
