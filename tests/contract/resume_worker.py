"""A small training run that is killed: run by test_06 in a process of its own, which forks one child for each life.

Events are what a run does to the disk and to the data: the n-th of them kills the child as `kill -9` would, before or
after the event. So every moment is reached, and the same one each time.

    resume_worker.py FOLDER '[["straight", []], ["killed", [17, 3]]]'

Each named run dies at its events one after another, then runs to its end. One process forks all of them, so that torch
is imported once.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upweight.core.batches import TokenBatch
from upweight.core.work import Machine
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.objectives.next_token import NextToken
from upweight.store.shards import Shards, ShardWriter
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.loader import MixtureLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Phase, Timeline
from upweight.train.trainer import train

TIMELINE = Timeline(
    [
        Phase("stable", 700, 0.02, 0.02, {"a": 0.7, "b": 0.3}, 32, 1e4),
        Phase("decay", 500, 0.02, 0.0, {"a": 1.0}, 64, 4e4),  # pool a ends its first epoch in here
    ]
)


def prepare(folder: Path) -> None:
    """Two small pools."""
    random = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 20)):
        writer = ShardWriter(folder / name, vocab_size=32)
        for number in range(documents):
            tokens = random.integers(0, 32, int(random.integers(5, 50))).tolist()
            writer.write(tokens, source=name, document_id=f"{name}{number}")
        writer.close()


class Noisy(NextToken):
    """Next-token loss with dropout of targets, so that torch's random state matters too."""

    def __call__(self, policy: Any, batch: TokenBatch) -> Any:
        kept = (torch.rand(batch.weights.shape) < 0.9).float()
        return super().__call__(
            policy, TokenBatch(batch.tokens, batch.positions, batch.segments, batch.targets, batch.weights * kept)
        )


def run(
    folder: Path,
    checkpoints: Path,
    log: Path,
    *,
    objective: NextToken | None = None,
    machine: Machine | None = None,
    stop: int = 0,
) -> tuple[str, Transformer]:
    """Train to the end, or to step `stop`; returns the hash of the weights, and the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pools = {name: Shards.open(folder / name) for name in ("a", "b")}
    model = make_model(ModelConfig(vocab_size=32, width=16, layers=2, heads=2, kv_heads=2, ffn=32), 0)
    loader = MixtureLoader(pools, TIMELINE, seed=1, batch_tokens=128, microbatch_tokens=64)
    steps = train(
        model,
        objective=objective or Noisy(),
        loader=loader,
        timeline=TIMELINE,
        optimizer=OptimizerConfig(rest_scale=0.1, weight_decay=0.1),
        machine=machine,
        checkpoint=CheckpointConfig(checkpoints, every_steps=2),
    )
    with log.open("a") as file:
        for report in steps:
            file.write(f"{report.step} {report.consumed} {report.phase} {report.loss!r}\n")
            file.flush()
            if report.step == stop:
                break
    parts = [model.state_dict()[name].numpy().tobytes() for name in sorted(model.state_dict())]
    return hashlib.sha256(b"".join(parts)).hexdigest(), model


def watch(fatal: int) -> Callable[[], int]:
    """Count events, and die at number `fatal`. Returns what tells the count."""
    count = itertools.count(1)
    total = [0]

    def event() -> None:
        total[0] = next(count)
        if total[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            event()
            result = function(*args, **options)
            event()
            return result

        return wrapped

    os.fsync = around(os.fsync)
    Path.rename = around(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = around(shutil.rmtree)  # type: ignore[assignment]
    torch.save = around(torch.save)
    MixtureLoader.next = around(MixtureLoader.next)  # type: ignore[method-assign]
    Noisy.__call__ = around(Noisy.__call__)  # type: ignore[method-assign]
    return lambda: total[0]


def life(folder: Path, name: str, fatal: int) -> bool:
    """One process's life; whether it reached the end."""
    child = os.fork()
    if child == 0:
        told = watch(fatal)
        weights, _ = run(folder, folder / name / "checkpoints", folder / name / "log")
        (folder / name / "weights").write_text(f"{weights} {told()}")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a life of {name} failed")
    return os.WIFEXITED(status)


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # the first optimizer imports for two seconds: once will do
    if not (folder / "a").exists():
        prepare(folder)
    for name, deaths in runs:
        (folder / name).mkdir(exist_ok=True)
        for fatal in [*deaths, 0]:
            if life(folder, name, fatal):
                break


if __name__ == "__main__":
    main()
