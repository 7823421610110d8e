"""The loaders: documents by mixture (train/mixture.py), packed conversations, and items of any kind by epoch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from upweight.core.batches import TokenBatch
from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.packing import best_fit, lay, strip
from upweight.store.shards import Shards
from upweight.train.batching import Batch, Loader, divided, even_parts
from upweight.train.mixture import MixtureLoader
from upweight.train.parallel import World, readers
from upweight.train.shuffle import shuffled
from upweight.train.timeline import Setting

__all__ = ["Batch", "Encoded", "EncodedShards", "EpochLoader", "Loader", "MixtureLoader", "PackedLoader"]

WINDOW = 8192
"""Conversations that are packed together; more fill rows better and take longer to plan."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens.

    Attributes:
        tokens: at least two.
        trained: whether each token is to be predicted.
        source: what figures are counted by.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.trained):
            raise UserError(
                f"{len(self.tokens)} tokens but {len(self.trained)} marks of what is trained: expected one each"
            )
        if not any(self.trained[1:]):
            raise UserError(
                f"a conversation of {len(self.tokens)} tokens from {self.source!r} trains on none of them: "
                "it has no assistant turn, or the chat template's mask is empty"
            )


class EncodedShards(Sequence[Encoded]):
    """Conversations on disk, as many as there may be: each is read when its row is made.

    Args:
        shards: marked ones, of conversations that train on something each.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: Any) -> Any:
        tokens, trained = self.shards.sequence(index), self.shards.trained(index)
        return Encoded(tuple(tokens.tolist()), tuple(trained.tolist()), self.shards.source(index))

    def lengths(self) -> list[int]:
        """Tokens of each, without reading them."""
        lengths: list[int] = self.shards.lengths().tolist()
        return lengths


@dataclass
class StepCount:
    """The whole state of the loaders that plan their steps: how many were handed out."""

    steps: int = 0


class PackedLoader(Loader):
    """Whole conversations, several to a row. The timeline's unit is the optimizer step.

    Each epoch shuffles all conversations, fills rows by best fit in windows of `WINDOW`, shuffles the rows, and deals
    them out in steps of equal size (they differ by one row).

    Args:
        context: tokens of a row; a longer conversation is refused.
        batch_tokens: of one optimizer step, padding included, over all processes.
        microbatch_tokens: of one forward pass.
    """

    def __init__(
        self,
        items: Sequence[Encoded],
        *,
        context: int,
        batch_tokens: int,
        microbatch_tokens: int,
        epochs: int,
        seed: int,
        place: World | None = None,
    ) -> None:
        if not items:
            raise UserError("there are no conversations to train on")
        self._lengths = items.lengths() if isinstance(items, EncodedShards) else [len(item.tokens) for item in items]
        longest = max(self._lengths)
        if longest > context:
            raise UserError(
                f"a conversation of {longest} tokens does not fit a context of {context}: drop it or raise context"
            )
        if batch_tokens < context or epochs < 1:
            raise UserError(
                f"steps of {batch_tokens} tokens, rows of {context}, {epochs} epochs: a step holds a row or more, "
                "and there is at least one epoch"
            )
        self.items, self.context, self.epochs, self.seed = items, context, epochs, seed
        self.batch_tokens, self.microbatch_tokens = batch_tokens, microbatch_tokens
        self._world = place or readers()
        self._state = StepCount()
        self._last: list[int] = []
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        most = batch_tokens // context
        self._parts = [even_parts(len(self._rows(epoch)), most) for epoch in range(epochs)]

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs together."""
        return sum(len(parts) for parts in self._parts)

    @property
    def consumed(self) -> int:
        return self._state.steps

    @property
    def vocab_size(self) -> int:
        return self.items.shards.vocab_size if isinstance(self.items, EncodedShards) else 0

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state = StepCount(**state)

    def identity(self) -> Mapping[str, Any]:
        return {
            "conversations": len(self.items),
            "tokens": sum(self._lengths),
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
        }

    def documents(self) -> Sequence[str]:
        if not isinstance(self.items, EncodedShards):
            return [f"{self.items[index].source} {index}" for index in self._last]
        return [self.items.shards.document_id(index) for index in self._last]

    def next(self, setting: Setting) -> Sequence[TokenBatch]:
        epoch, step = self._where()
        start = sum(self._parts[epoch][:step])
        rows = self._rows(epoch)[start : start + self._parts[epoch][step]]
        self._state.steps += 1
        self._last = [index for row in rows for index in row]
        most = max(1, self.microbatch_tokens // self.context)
        return [self._batch(part) for part in divided(rows, self._world, most)]

    def _where(self) -> tuple[int, int]:
        step = self._state.steps
        for epoch, parts in enumerate(self._parts):
            if step < len(parts):
                return epoch, step
            step -= len(parts)
        raise ValueError(f"step {self._state.steps} is past the {self.steps} steps of {self.epochs} epochs")

    def _rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as indices of conversations: a function of the seed and the epoch alone."""
        if self._plan[0] != epoch:
            count = len(self.items)
            order = [shuffled(place, count, seed_for(self.seed, "order", epoch)) for place in range(count)]
            rows: list[list[int]] = []
            for start in range(0, count, WINDOW):
                window = order[start : start + WINDOW]
                fitted = best_fit([self._lengths[index] for index in window], self.context)
                rows += [[window[index] for index in row] for row in fitted]
            key = seed_for(self.seed, "rows", epoch)
            self._plan = epoch, [rows[shuffled(place, len(rows), key)] for place in range(len(rows))]
        return self._plan[1]

    def _batch(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        chosen = [index for row in rows for index in row]
        strips = [strip(self.items[index].tokens, self.items[index].trained) for index in chosen]
        places = iter(range(len(chosen)))
        return lay(strips, [[next(places) for _ in row] for row in rows], self.context)


class EpochLoader(Loader, Generic[Item]):
    """Items of any kind (pairs, tagged documents), shuffled anew each epoch. The timeline's unit is the optimizer step.

    Args:
        make: turns this process's items of a step into microbatches.
        items_a_step: over all processes; the steps of an epoch are equally long, to one item.
    """

    def __init__(
        self,
        items: Sequence[Item],
        make: Callable[[Sequence[Item]], Sequence[Batch]],
        *,
        items_a_step: int,
        epochs: int,
        seed: int,
        place: World | None = None,
    ) -> None:
        self._world = place or readers()
        self._parts = even_parts(len(items), max(1, items_a_step))
        if not items or epochs < 1 or items_a_step < 1 or min(self._parts) < self._world.size:
            raise UserError(
                f"{len(items)} items, {epochs} epochs, {items_a_step} items a step for {self._world.size} processes: "
                "expected some items, an epoch or more, and an item for each process in every step"
            )
        self.items, self.make, self.epochs, self.seed, self.items_a_step = items, make, epochs, seed, items_a_step
        self._state = StepCount()
        self._last: list[int] = []

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs together."""
        return len(self._parts) * self.epochs

    @property
    def consumed(self) -> int:
        return self._state.steps

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state = StepCount(**state)

    def identity(self) -> Mapping[str, Any]:
        return {"items": len(self.items), "items_a_step": self.items_a_step, "seed": self.seed}

    def documents(self) -> Sequence[str]:
        """The last step's items by their place among all, counted from 0."""
        return [f"item {index}" for index in self._last]

    def next(self, setting: Setting) -> Sequence[Batch]:
        epoch, step = divmod(self._state.steps, len(self._parts))
        if epoch >= self.epochs:
            raise ValueError(f"step {self._state.steps} is past the {self.steps} steps of {self.epochs} epochs")
        start = sum(self._parts[:step])
        key = seed_for(self.seed, "order", epoch)
        whole = [shuffled(place, len(self.items), key) for place in range(start, start + self._parts[step])]
        self._state.steps += 1
        self._last = whole
        return self.make([self.items[index] for index in whole[self._world.rank :: self._world.size]])
