"""The trainer on CUDA against the same on CPU: every objective, both optimizers, compiled layers, recomputation,
resume, a sharded world of one, and the sampler's log-probabilities against the trainer's (contract 5)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from objective_cases import OneStep, cases, one_step
from torch import Tensor, nn

from upweight.core.packing import lay, pack, strip
from upweight.core.protocols import Limits
from upweight.core.work import Machine
from upweight.model.config import ModelConfig
from upweight.model.logprobs import token_logprobs, token_scores
from upweight.model.transformer import Transformer, make_model
from upweight.objectives.next_token import NextToken
from upweight.rollout.local import LocalSampler
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig
from upweight.train.optimizer import OptimizerConfig, orthogonalise
from upweight.train.timeline import constant
from upweight.train.trainer import StepReport, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
SHAPE = ModelConfig(vocab_size=97, width=128, layers=3, heads=4, kv_heads=2, ffn=256, qk_norm=True)
PLAIN = Machine(device=DEVICE, compile="off")
COMPILED = Machine(device=DEVICE, compile="on")


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(packed: bool = True) -> list:
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ((100, 156, 200), (31, 225, 256)):
        strips = []
        for length in lengths:
            tokens = torch.randint(0, 97, (length,), generator=generator).tolist()
            strips.append(strip(tokens, [1.0] * length))
        made.append(pack(strips, 256) if packed else lay(strips, [[0], [1], [2]], 256))
    return made


def trained(
    machine: Machine,
    *,
    steps: int = 4,
    packed: bool = True,
    dtype: str = "float32",
    kind: Literal["adamw", "muon"] = "adamw",
    model: Transformer | None = None,
    directory: Path | None = None,
    stop: int = 0,
) -> tuple[list[StepReport], nn.Module]:
    """The reports of a short run; `stop` drops the run after so many steps, as a kill would."""
    policy = make_model(SHAPE, 0) if model is None else model
    reports = []
    run = train(
        policy,
        objective=NextToken(),
        loader=OneStep(batches(packed)),
        timeline=constant(total=steps, lr=0.01),
        optimizer=OptimizerConfig(kind=kind),
        machine=machine,
        checkpoint=None if directory is None else CheckpointConfig(directory, every_steps=1),
        dtype=dtype,
    )
    for report in run:
        reports.append(report)
        if stop and report.step > stop:
            break  # the report of a step comes before its checkpoint: the steps up to `stop` are saved
    run.close()
    return reports, policy


def losses(reports: list[StepReport]) -> list[float]:
    return [report.loss for report in reports]


@pytest.mark.parametrize("packed", [True, False])
def test_steps_are_those_of_the_cpu(packed: bool) -> None:
    ours, _ = trained(PLAIN, packed=packed)
    theirs, _ = trained(Machine(), packed=packed)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)
    assert ours[-1].gradient_norm == pytest.approx(theirs[-1].gradient_norm, rel=2e-2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_give_the_same(packed: bool, dtype: str) -> None:
    plain, _ = trained(PLAIN, packed=packed, dtype=dtype)
    compiled, _ = trained(COMPILED, packed=packed, dtype=dtype)
    # bfloat16 rounds to 2^-8 relative; the losses are about 4.6 nats
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4 if dtype == "float32" else 1e-2)


def test_bfloat16_stays_close_to_float32() -> None:
    exact, _ = trained(COMPILED)
    short, _ = trained(COMPILED, dtype="bfloat16")
    assert losses(short) == pytest.approx(losses(exact), rel=1e-2)


@pytest.mark.parametrize(
    ("machine", "packed"), [(PLAIN, True), (PLAIN, False), (COMPILED, True)], ids=["plain packed", "plain", "compiled"]
)
def test_recomputation_gives_the_same_gradient(machine: Machine, packed: bool) -> None:
    tokens = batches(packed)[0].to(DEVICE)
    found = []
    for share in (0.0, 0.6, 1.0):
        torch.compiler.reset()
        model = make_model(SHAPE, 0).to(DEVICE)
        model.compiled, model.recompute = machine.compiles, share
        NextToken()(model, tokens).total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert (other[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_memory_kept_shrinks_with_recomputation() -> None:
    shape = ModelConfig(vocab_size=97, width=256, layers=8, heads=4, kv_heads=2, ffn=1024)
    tokens = torch.zeros(8, 1024, dtype=torch.long, device=DEVICE)
    for compiled in (False, True):
        kept = []
        for share in (0.0, 1.0):
            torch.compiler.reset()
            model = make_model(shape, 0).to(DEVICE)
            model.compiled, model.recompute = compiled, share
            for _ in range(2):  # the first pass of compiled layers also measures
                before = torch.cuda.memory_allocated()
                hidden = model(tokens)
                held = torch.cuda.memory_allocated() - before
                hidden.sum().backward()
                model.zero_grad()
                del hidden
            kept.append(held)
        assert kept[0] > 3 * kept[1], kept


@pytest.mark.parametrize("name", sorted(cases()))
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_objective_is_that_of_the_cpu(name: str, kind: Literal["adamw", "muon"]) -> None:
    case = cases()[name]
    there, _ = one_step(case, [case.make(case.items, 64)], kind="adamw" if kind == "muon" else kind)
    teacher = getattr(case.objective, "teacher", None)
    if isinstance(teacher, nn.Module):
        teacher.to(DEVICE)
    here, _ = one_step(case, [case.make(case.items, 64)], kind=kind, machine=PLAIN)
    if isinstance(teacher, nn.Module):
        teacher.to("cpu")
    assert here.loss == pytest.approx(there.loss, rel=1e-3, abs=1e-5)
    assert here.weight == pytest.approx(there.weight, rel=1e-6)
    assert here.gradient_norm == pytest.approx(there.gradient_norm, rel=1e-2, abs=1e-5)


def test_muon_is_close_to_the_cpus() -> None:
    matrices = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    exact, short = orthogonalise(matrices), orthogonalise(matrices.to(DEVICE)).float().cpu()
    assert (short - exact).norm() < 0.05 * exact.norm()  # bfloat16 in the products of five steps
    ours, _ = trained(PLAIN, kind="muon", steps=6)
    theirs, _ = trained(Machine(), kind="muon", steps=6)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 128])
def test_fused_scores_and_their_gradients(dtype: torch.dtype, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, matrix = torch.randn(300, 64, generator=generator), torch.randn(1000, 64, generator=generator) / 4
    targets, weights = torch.randint(0, 1000, (300,), generator=generator), torch.rand(300, generator=generator)
    found = []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        read, rows = (part.clone().to(device).requires_grad_() for part in (hidden, matrix))
        with torch.autocast(device, kind, enabled=kind != torch.float32):
            scores = token_scores(read, rows, targets.to(device), temperature=0.8, chunk=chunk)
        total = (scores.logprobs * weights.to(device)).sum() + 0.1 * scores.log_normaliser.square().sum()
        total.backward()
        found.append([part.detach().float().cpu() for part in (*scores, read.grad, rows.grad)])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).norm() < bound * theirs.norm()


@pytest.mark.parametrize("machine", [PLAIN, COMPILED], ids=["plain", "compiled"])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, machine: Machine) -> None:
    whole, straight = trained(machine, steps=6, directory=tmp_path / "whole", kind="muon")
    trained(machine, steps=6, directory=tmp_path / "killed", stop=3, kind="muon")
    rest, resumed = trained(machine, steps=6, directory=tmp_path / "killed", kind="muon", model=make_model(SHAPE, 9))
    assert [report.step for report in rest] == [4, 5, 6]
    assert losses(rest) == pytest.approx(losses(whole)[3:], rel=1e-4)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("machine", [PLAIN, COMPILED], ids=["plain", "compiled"])
def test_sharded_over_one_process(machine: Machine, tmp_path: Path) -> None:
    alone, _ = trained(machine)
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        sharded, _ = trained(machine, model=sharding.shard(make_model(SHAPE, 0).to(DEVICE)))
    finally:
        dist.destroy_process_group()
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_reports_what_the_trainer_computes(dtype: torch.dtype) -> None:
    tokenizer = Tokenizer.train([f"{a} and {b} make {a + b}.\n" for a in range(20) for b in range(20)], 300)
    config = ModelConfig(tokenizer.vocab_size, width=64, layers=2, heads=4, kv_heads=2, ffn=128, qk_norm=True)
    model = make_model(config, 1)
    with torch.no_grad():
        model.norm.weight.mul_(8)  # likely and unlikely tokens, as a trained model has
    model = model.to(DEVICE, dtype)
    prompts, limits = ["3 and 4 make", "1", "12 and 19 make 31.\n7 and"], Limits(24, temperature=0.8, seed=3)
    groups = LocalSampler(model, tokenizer, batch_rows=7).sample(prompts, count=4, limits=limits)
    differences: list[Tensor] = []
    for prompt, group in zip(prompts, groups, strict=True):
        read = tokenizer.encode(prompt)
        for completion in group:
            tokens = torch.tensor([read + list(completion.tokens)], device=DEVICE)
            with torch.no_grad():
                hidden = model(tokens)[0, len(read) - 1 : -1]
                again = token_logprobs(hidden, model.unembedding, tokens[0, len(read) :], temperature=0.8)
            differences.append((again.float().cpu() - torch.tensor(completion.logprobs)).abs())
    apart = torch.cat(differences)
    # bfloat16 keeps 8 bits: logits of about 8 are 0.03 apart from one value to the next
    worst, mean = (1e-3, 1e-4) if dtype == torch.float32 else (0.5, 0.05)
    assert apart.max() < worst
    assert apart.mean() < mean


def test_one_sequence_a_row_needs_no_mask() -> None:
    alone, together = batches(packed=False)[0], batches(packed=True)[0]
    assert alone.to(DEVICE).attended is None
    assert together.to(DEVICE).attended is not None
    model = make_model(SHAPE, 0).to(DEVICE)
    with torch.no_grad():
        one, other = (NextToken()(model, batch.to(DEVICE)) for batch in (alone, together))
    torch.testing.assert_close(one.total, other.total, rtol=1e-3, atol=1e-3)
