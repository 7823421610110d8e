"""What a loader is, and how the rows of one step are divided among processes and microbatches.

A loader hands out the microbatches of one optimizer step at a time and knows how far it has come. Its whole state is
plain JSON: a checkpoint holds it, and a restored loader goes on with the very next step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from upweight.train.parallel import World
from upweight.train.timeline import Setting

Item = TypeVar("Item")


@runtime_checkable
class Batch(Protocol):
    """What the trainer needs of a microbatch; the objective knows the rest."""

    @property
    def token_count(self) -> int:
        """Tokens that are no padding."""
        ...

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        ...


class Loader(ABC):
    """Where batches come from."""

    @property
    @abstractmethod
    def consumed(self) -> int:
        """The position on the timeline, in its unit."""

    @abstractmethod
    def next(self, setting: Setting) -> Sequence[Any]:
        """This process's microbatches of the next optimizer step; `consumed` has moved past it when it returns.

        Args:
            setting: what holds for the step's first unit; the step does not reach past the end of its phase.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain JSON from which `restore` goes on with the very next step."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""

    def identity(self) -> Mapping[str, Any]:
        """What must be equal for a state to mean the same to another loader: plain JSON. A mismatch is refused."""
        return {}

    @property
    def reads_policy(self) -> bool:
        """Whether the next step is made with the policy's weights of that moment: where the policy is sharded, the
        model that was handed to the trainer is given them before each step."""
        return False

    @property
    def vocab_size(self) -> int:
        """What all token ids lie below; 0 where the loader cannot tell. A model with fewer embeddings is refused."""
        return 0

    def shares(self) -> Mapping[str, float]:
        """The share of each source in the last step's tokens; empty where the loader does not mix sources."""
        return {}

    def documents(self) -> Sequence[str]:
        """Names of what the last step was made of, to be named when it breaks; empty where the loader cannot tell."""
        return ()


def divided(rows: Sequence[Item], world: World, most: int) -> list[list[Item]]:
    """This process's rows in microbatches of at most `most`, evenly filled; every process gets as many of them."""
    mine = rows[world.rank :: world.size]
    count = max(1, math.ceil(math.ceil(len(rows) / world.size) / most))
    return [list(mine[index::count]) for index in range(count)]


def even_parts(total: int, most: int) -> list[int]:
    """`total` cut into as few parts of at most `most` as it takes, their sizes differing by at most one."""
    count = max(1, math.ceil(total / most))
    return [total * (index + 1) // count - total * index // count for index in range(count)]
