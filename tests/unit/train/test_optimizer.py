"""Optimizers: Muon against its definition, which parameter goes where, clipping, and states that are restored."""

import pytest
import torch
from torch import nn

from upweight.core.errors import UserError
from upweight.model.transformer import ModelConfig, make_model
from upweight.train import optimizer as optimizers
from upweight.train.optimizer import Muon, Optimizer, OptimizerConfig, orthogonalise


def test_newton_schulz_makes_singular_values_about_one() -> None:
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert float(values.min()) > 0.6  # the coefficients trade exactness for speed: singular values land in 0.7-1.2
    assert float(values.max()) < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    product = orthogonalise(matrices).flatten(1)
    exact = (left @ right).flatten(1)
    assert float(torch.cosine_similarity(product, exact).min()) > 0.98


def test_matrices_of_one_shape_do_not_influence_each_other() -> None:
    matrices = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(matrices)
    for number in range(4):
        assert torch.allclose(together[number], orthogonalise(matrices[number : number + 1])[0], atol=1e-5)


def test_a_bound_on_the_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (1 << 28, 300, 1):  # five matrices of 128 entries: all, two, one at a time
        monkeypatch.setattr(optimizers, "ORTHOGONALISED_AT_ONCE", together)
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(16, 8, generator=generator)) for _ in range(5)]
        for parameter in parameters:
            parameter.grad = torch.randn(16, 8, generator=generator)
        Muon(parameters, lr=0.02, momentum=0.95, weight_decay=0.1).step()
        found.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_muon_is_torchs_muon() -> None:
    start = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    pair = [Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for step in range(3):
        gradient = torch.randn(16, 8, generator=torch.Generator().manual_seed(step + 1))
        for parameter, one in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            one.step()
    # torch iterates in bfloat16, which is good to about 1 % of an update of 0.02 sqrt(2) / sqrt(8)
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert not torch.allclose(ours, start, atol=2e-2)


def test_which_parameter_goes_where() -> None:
    model = make_model(ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, ffn=16, tied=False), 0)
    optimizer = Optimizer(model, OptimizerConfig(rest_scale=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, rest = optimizer.optimizers
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert matrices == {f"layers.0.{name}.weight" for name in ("qkv", "out", "gate_up", "down")}
    others = {names[id(p)]: (g["weight_decay"], g["scale"]) for g in rest.param_groups for p in g["params"]}
    assert others["embedding.weight"] == others["head.weight"] == (0.0, 0.5)
    assert others["norm.weight"] == (0.0, 0.5)
    assert len(matrices) + len(others) == len(names)
    adamw = Optimizer(model, OptimizerConfig(kind="adamw", weight_decay=0.1))
    decays = {g["weight_decay"]: len(g["params"]) for g in adamw.optimizers[0].param_groups if g["weight_decay"]}
    assert decays == {0.1: 4}


def test_gradients_are_divided_once_and_clipped() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.tensor([[30.0, 0.0], [0.0, 40.0]])
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", clip_norm=1.0))
    assert optimizer.divide(10.0) == pytest.approx(5.0)  # sqrt(3^2 + 4^2)
    assert model.weight.grad.flatten().tolist() == pytest.approx([0.6, 0, 0, 0.8], rel=1e-4)
    model.weight.grad = torch.tensor([[30.0, 0.0], [0.0, 40.0]])
    assert Optimizer(model, OptimizerConfig(kind="adamw", clip_norm=0.0)).divide(10.0) == pytest.approx(5.0)
    assert model.weight.grad.flatten().tolist() == [3.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on(kind: str) -> None:
    def stepped(times: int, restore_at: int | None) -> torch.Tensor:
        model = make_model(ModelConfig(vocab_size=10, width=8, layers=2, heads=2, kv_heads=1, ffn=16), 0)
        optimizer = Optimizer(model, OptimizerConfig(kind=kind))  # type: ignore[arg-type]
        for step in range(times):
            if step == restore_at:
                state = optimizer.state()
                optimizer = Optimizer(model, OptimizerConfig(kind=kind))  # type: ignore[arg-type]
                optimizer.restore(state)
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.divide(1.0)
            optimizer.step(0.01)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(stepped(4, None), stepped(4, 2))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="0 or above"):
        OptimizerConfig(weight_decay=-1.0)
