"""Contract 1: a loss and its gradient do not depend on accumulation, packing, padding, order or number of processes.

Put back on purpose, each of these fails here: dividing per microbatch (trl#6024), averaging gradients over processes,
forgetting to add up weights, attention across segments.
"""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from objective_cases import VOCABULARY, Case, OneStep, all_objectives, cases, difference, one_step

from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.next_token import NextToken
from upweight.store.shards import Shards, ShardWriter
from upweight.train import parallel, sharding
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.loader import MixtureLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import constant, wsd
from upweight.train.trainer import StepReport, train

CASES = cases()
TOLERANCE = 2e-5
"""fp32: weights move by up to 1, sums are over some hundred terms."""
SHAPE = ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
TWO_STEPS = constant(total=2, lr=0.02)


def test_every_objective_has_a_case() -> None:
    assert all_objectives() == {name.split()[0] for name in CASES}


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def whole(case: Case) -> tuple[object, dict[str, torch.Tensor]]:
    return one_step(case, [case.make(case.items, 256)])


@pytest.mark.parametrize("parts", [[8], [4, 4], [1] * 8, [5, 1, 2], "reversed", "narrow rows"])
def test_the_cut_does_not_matter(case: Case, whole: tuple[object, dict[str, torch.Tensor]], parts: object) -> None:
    items = list(case.items)
    if parts == "reversed":
        batches = [case.make(items[::-1], 256)]
    elif parts == "narrow rows":
        batches = [case.make(items, 24)]
    else:
        assert isinstance(parts, list)
        starts = [sum(parts[:index]) for index in range(len(parts))]
        batches = [case.make(items[start : start + n], 256) for start, n in zip(starts, parts, strict=True)]
    report, weights = one_step(case, batches)
    expected, expected_weights = whole
    assert difference(case.policy().state_dict(), weights) > 1e-3  # the step did something
    assert difference(weights, expected_weights) < TOLERANCE
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)  # type: ignore[attr-defined]
    assert report.weight == expected.weight  # type: ignore[attr-defined]
    assert report.terms == pytest.approx(expected.terms, rel=1e-4, abs=1e-6)  # type: ignore[attr-defined]
    assert report.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_accumulation_does_not_matter_over_a_whole_run(tmp_path: Path, kind: Literal["adamw", "muon"]) -> None:
    random = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "p", vocab_size=VOCABULARY)
    for number in range(120):
        length = int(random.choice([3, 7, 20, 60, 150]))  # unequal, some longer than a row
        writer.write(random.integers(0, VOCABULARY, length).tolist(), source="s", document_id=str(number))
    writer.close()
    timeline = wsd(warmup=512, stable=2048, decay=1024, peak_lr=0.01, mixture={"p": 1.0}, context=64)

    def run(microbatches: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = make_model(SHAPE, 0)
        loader = MixtureLoader(
            {"p": Shards.open(tmp_path / "p")},
            timeline,
            seed=0,
            batch_tokens=512,
            microbatch_tokens=512 // microbatches,
        )
        options = OptimizerConfig(kind=kind, weight_decay=0.1)
        steps = train(model, objective=NextToken(), loader=loader, timeline=timeline, optimizer=options)
        return [report.loss for report in steps], model.state_dict()

    losses, weights = run(1)
    assert len(losses) == 7
    assert difference(make_model(SHAPE, 0).state_dict(), weights) > 0.01
    for microbatches in (2, 8):
        other_losses, other_weights = run(microbatches)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert difference(weights, other_weights) < 1e-5


def process(rank: int, size: int, port: int, folder: str) -> None:
    """One of several processes: takes every `size`-th item, unevenly many, and saves what it ended with."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    results = {}
    with parallel.joined():
        for name, case in cases().items():
            mine = list(case.items[:5]) if rank == 0 else list(case.items[5:])
            batches = [case.make(mine[:2], 256), case.make(mine[2:], 24)]
            report, weights = one_step(case, batches)
            results[name] = (report.loss, report.weight, dict(report.terms), weights)
            if name in ("NextToken", "Dpd"):
                kind: Literal["adamw", "muon"] = "muon" if name == "Dpd" else "adamw"
                policy = sharding.shard(case.policy())
                batches = [case.make([item], 256) for item in mine]  # 5 microbatches here, 3 there
                report, _ = one_step(case, batches, policy, kind)
                whole = {key: value.full_tensor() for key, value in policy.state_dict().items()}
                results[f"{name} sharded {kind}"] = (report.loss, report.weight, dict(report.terms), whole)
        saved_and_resumed = sharded_resume(Path(folder))
    torch.save((results, saved_and_resumed), f"{folder}/{rank}.pt")


def sharded_resume(folder: Path) -> float:
    """How far a resumed sharded run ends from the one that went straight on."""
    case = cases()["NextToken"]

    def run() -> tuple[Iterator[StepReport], torch.nn.Module]:
        policy = sharding.shard(case.policy())
        keep = CheckpointConfig(folder / "sharded", every_steps=1)
        loader = OneStep([case.make(case.items, 256)])
        return train(policy, objective=case.objective, loader=loader, timeline=TWO_STEPS, checkpoint=keep), policy

    straight, one = run()
    next(straight)
    next(straight)  # the second step; the first is being written beside it
    while not any(not path.name.startswith(".") for path in (folder / "sharded").glob("*")):
        time.sleep(0.02)
    dist.barrier()
    resumed, other = run()
    assert next(resumed).step == 2
    weights = [
        {name: value.full_tensor() for name, value in policy.state_dict().items()}  # type: ignore[operator]
        for policy in (one, other)
    ]
    return difference(*weights)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, args=(2, port, str(folder)), nprocs=2)
    return folder


def test_the_number_of_processes_does_not_matter(two_processes: Path) -> None:
    for rank in range(2):
        results, _ = torch.load(two_processes / f"{rank}.pt")
        for name, (loss, weight, terms, weights) in results.items():
            objective, _, kind = name.partition(" sharded ")
            case = CASES[objective]
            report, expected = one_step(case, [case.make(case.items, 256)], kind=kind or "adamw")
            assert difference(weights, expected) < TOLERANCE, name
            assert (loss, weight) == (pytest.approx(report.loss, rel=1e-5), report.weight), name
            assert terms == pytest.approx(report.terms, rel=1e-4, abs=1e-6), name


def test_a_sharded_run_resumes_and_one_process_takes_it_up(two_processes: Path) -> None:
    assert [torch.load(two_processes / f"{rank}.pt")[1] for rank in range(2)] == [0, 0]  # bit for bit
    case = CASES["NextToken"]
    policy = case.policy()
    keep = CheckpointConfig(two_processes / "sharded", every_steps=1)
    loader = OneStep([case.make(case.items, 256)])
    # both processes read the same rows, so one process sees half the sum over half the weight: the same step
    (report,) = train(policy, objective=case.objective, loader=loader, timeline=TWO_STEPS, checkpoint=keep)
    assert report.step == 2
