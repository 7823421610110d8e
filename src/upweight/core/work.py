"""What a stage is and what it is handed: its inputs, a directory to write to, the machine, and somebody who watches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from upweight.core.errors import UserError

Summary = Mapping[str, Any]
"""What a stage reports: JSON data. Numbers the report shows, and examples under keys of their own."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the work runs. Never counts towards identity: a result must not depend on it.

    Attributes:
        device: a torch device name.
        threads: CPU threads of one process; 0 leaves torch's default.
        workers: processes for work that is parallel over documents or programs.
        cluster: a Ray cluster for work that is parallel over documents: its address ("auto" for the one of this
            machine), or "local" for one of `workers` workers that lasts as long as a step. "" is processes.
        unsafe_execution: run model-written code without isolation where isolation is not to be had.
        compile: whether the compiler fuses the layers of a model in training: "on", "off", or "auto", which is on for
            CUDA. It takes up to a minute at the start of each training step of a recipe.
        recompute: activation checkpointing: the share, 0 to 1, of what the layers would keep for the gradient that is
            computed again instead, for less memory and more work.
        sharding: of several processes that torchrun started: "replicated" where each holds all of the model, "fsdp"
            where weights, gradients and optimizer state are split over them.
        tensor: processes that hold parts of the same matrices; those beside them read other rows.
        context: processes that take parts of the same rows, for contexts too long for one.
    """

    device: str = "cpu"
    threads: int = 0
    workers: int = 2
    cluster: str = ""
    unsafe_execution: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    recompute: float | int = 0.0
    sharding: Literal["replicated", "fsdp"] = "replicated"
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"compile is {self.compile!r}: expected 'auto', 'on' or 'off'")
        if self.sharding not in ("replicated", "fsdp"):
            raise UserError(f"sharding is {self.sharding!r}: expected 'replicated' or 'fsdp'")
        if self.tensor < 1 or self.context < 1:
            raise UserError(
                f"tensor is {self.tensor} and context {self.context}: each is a number of processes, from 1"
            )
        if not 0 <= self.recompute <= 1:
            raise UserError(f"recompute is {self.recompute}: expected a share from 0 to 1")

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled on this device."""
        return self.compile == "on" or (self.compile == "auto" and self.device.startswith("cuda"))


class Bar(ABC):
    """Progress of one long piece of work."""

    @abstractmethod
    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        """`amount` more units are done; `shown` are figures to print beside the bar (loss=2.31)."""


class Monitor(ABC):
    """Who watches a stage: the terminal and the artifact's metrics.jsonl."""

    @abstractmethod
    @contextmanager
    def track(self, label: str, *, total: float | int, unit: str, done: float | int = 0) -> Iterator[Bar]:
        """A progress bar of `total` units, `done` of them done in an earlier run; rate and ETA follow."""

    @abstractmethod
    def record(self, **metrics: Any) -> None:
        """Append one row to the artifact's metrics.jsonl."""

    @abstractmethod
    def say(self, line: str) -> None:
        """One plain line for the person who waits."""


class Silent(Monitor):
    """Watches nothing and keeps the recorded rows, for tests and library use."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def track(self, label: str, *, total: float | int, unit: str, done: float | int = 0) -> Iterator[Bar]:
        yield _NoBar()

    def record(self, **metrics: Any) -> None:
        self.rows.append(metrics)

    def say(self, line: str) -> None:
        return


class _NoBar(Bar):
    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        return


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage is handed.

    Attributes:
        out: the directory being built; everything the stage writes lies below it. After a kill it is handed out again
            with what was there, so a stage resumes from its own files or overwrites them.
        inputs: the directories of the input artifacts, by the names that the recipe's step gives them.
        seed: derived from the recipe's seed and the step's name.
    """

    out: Path
    inputs: Mapping[str, Path]
    machine: Machine = Machine()
    monitor: Monitor = field(default_factory=Silent)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step is expected to cost, before it runs.

    Attributes:
        tokens: tokens trained on, sampled or read.
        flops: floating-point operations.
        sampled_flops: those of `flops` that write one token at a time, which no machine does at the speed of training.
        memory_bytes: peak of one process.
        disk_bytes: size of the artifact.
        parameters: of the model that the step makes; 0 where it makes none.
        token_bytes: what training that model keeps of one token for the gradient, in float32; 0 where nobody knows.
        held_bytes: what decoding with it keeps of one token (keys and values), in float32; 0 where nobody knows.
        records: by file of the artifact, how many it will hold, as far as that is known.
        record_tokens: of one of them (of a pair, one response with its prompt); 0 where nobody knows.
        vocabulary: tokens of the tokenizer that the step makes; 0 where it makes none.
        seconds: overhead that flops do not explain (documents read, programs run), on one core.
    """

    tokens: float | int = 0.0
    flops: float | int = 0.0
    sampled_flops: float | int = 0.0
    memory_bytes: float | int = 0.0
    disk_bytes: float | int = 0.0
    parameters: float | int = 0.0
    token_bytes: float | int = 0.0
    held_bytes: float | int = 0.0
    records: Mapping[str, float | int] = field(default_factory=dict)
    record_tokens: float | int = 0.0
    vocabulary: int = 0
    seconds: float | int = 0.0


class Stage(Protocol):
    """A verb of the recipe: a module of stages/, or any object of a user's with these names.

    A stage that has `ALL_PROCESSES = True` as well is run by every process that torchrun started, each with an `out`
    of its own, of which that of the first is kept. Any other is run by the first process while the rest wait.

    Fields of its Config that name files outside the run are marked, `path: str = field(metadata=OUTSIDE)` of
    core/files.py: a run says where one of them changed since it was read.
    """

    Config: type
    """A frozen dataclass: every choice that can change the result."""

    def run(self, config: Any, work: Work) -> Summary:
        """Build the artifact in `work.out` and say what was done."""
        ...

    def estimate(self, config: Any, inputs: Mapping[str, Estimate]) -> Estimate:
        """The cost, from the configuration and the estimates of the inputs alone."""
        ...
