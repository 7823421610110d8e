"""AdamW, and Muon for matrices with AdamW for the rest.

Muon (Jordan et al. 2024) replaces the momentum G of a matrix by the nearest orthogonal one, found by five steps of the
Newton-Schulz iteration X <- a X + (b X X^T + c (X X^T)^2) X, and scales it by sqrt(max(1, rows / columns)).

torch.optim.Muon does the same one matrix at a time and in bfloat16. A processor without bfloat16 instructions takes
0.86 s for the 16 matrices of a 0.9M model that way and 0.05 s here, where matrices of one shape are orthogonalised
together, in float32 on CPU and in bfloat16 on CUDA.

Weight decay is decoupled and for matrices only: neither norms and biases nor embeddings decay.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from upweight.core.errors import UserError
from upweight.train.sharding import by_mesh, gathered, laid_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ORTHOGONALISED_AT_ONCE = 1 << 28
"""Elements of the matrices of one shape that are orthogonalised together: this bounds the memory that it takes."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Attributes:
    kind: "adamw" for every parameter, or "muon" for the matrices within the layers and AdamW for the rest.
    rest_scale: the rate of embeddings, head, norms and biases as a multiple of the timeline's rate, which is that of
        the matrices within the layers.
    momentum: of Muon.
    betas, epsilon: of AdamW.
    weight_decay: decoupled; each step shrinks the matrices by rate x weight_decay.
    clip_norm: gradients are scaled down to this norm over all parameters; 0 leaves them.
    """

    kind: Literal["adamw", "muon"] = "muon"
    rest_scale: float = 1.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise UserError(f"optimizer kind is {self.kind!r}: expected 'adamw' or 'muon'")
        if self.rest_scale < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise UserError("rest_scale, weight_decay and clip_norm of an optimizer must be 0 or above")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for two-dimensional parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. A sharded matrix is gathered to be orthogonalised."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape[:-1].numel(), parameter.shape[-1]), []).append(parameter)
            for (rows, columns), members in by_shape.items():
                together = max(1, ORTHOGONALISED_AT_ONCE // (rows * columns))
                for start in range(0, len(members), together):
                    self._update(members[start : start + together], group, max(1.0, rows / columns) ** 0.5)

    def _update(self, members: Sequence[nn.Parameter], group: Mapping[str, Any], scale: float) -> None:
        """The step of some matrices of one shape."""
        orthogonal = orthogonalise(torch.stack([self._direction(parameter, group) for parameter in members]))
        for parameter, direction in zip(members, orthogonal, strict=True):
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(laid_like(direction.to(parameter.dtype), parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """Nesterov's momentum, whole, in the dtype that it is orthogonalised in."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        return _orthogonalised_in(gathered(parameter.grad.lerp(momentum, group["momentum"])).flatten(0, -2))


def _orthogonalised_in(matrices: Tensor) -> Tensor:
    return matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T of a stack [matrix row column], by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = _orthogonalised_in(matrices)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal


class Optimizer:
    """The optimizers of a model behind one rate. The timeline says the rate; each group has its scale."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inner, edge, vectors = _split(model)
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kinds = [(edge, 0.0, config.rest_scale), (vectors, 0.0, config.rest_scale)]
        self.optimizers: list[torch.optim.Optimizer] = []
        if config.kind == "muon" and inner:
            muon = Muon(inner, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
            muon.param_groups[0]["scale"] = 1.0
            self.optimizers.append(muon)
        elif inner:
            kinds.insert(0, (inner, config.weight_decay, 1.0))
        # a step takes the parameters of a group together, which those on different meshes cannot be
        kept: list[dict[str, Any]] = [
            {"params": members, "weight_decay": decay, "scale": scale}
            for parameters, decay, scale in kinds
            for members in by_mesh(parameters)
        ]
        if kept:
            self.optimizers.append(torch.optim.AdamW(kept, lr=0.0, betas=config.betas, eps=config.epsilon, fused=True))

    def divide(self, weight: float) -> float:
        """Divide all gradients by `weight`, clip them, and return their norm before clipping."""
        together = by_mesh(parameter for parameter in self.parameters if parameter.grad is not None)
        norms = []
        for parameters in together:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, weight)
            norms.append(gathered(torch.nn.utils.get_total_norm(gradients)))
        norm = (
            norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        )
        if self.config.clip_norm:
            for parameters in together:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return float(norm)

    def step(self, lr: float) -> None:
        """Update at the rate `lr` and forget the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Any]]:
        """What a later run needs to go on, by the name of its parameter; tensors as they lie over the processes."""
        return {
            self.names[parameter]: dict(optimizer.state[parameter])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in optimizer.state
        }

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from what `state` returned, its tensors whole, in however many processes."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    entry = states.get(self.names[parameter], {})
                    optimizer.state[parameter] = {
                        name: laid_like(value.to(parameter.device), parameter) if isinstance(value, Tensor) else value
                        for name, value in entry.items()
                    }


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices within the layers, embedding and head matrices, and everything that is no matrix."""
    inner, edge, vectors = [], [], []
    edges = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # a wrapped model's head has the name that its architecture gives it
    edges |= {id(module.unembedding) for module in model.modules() if hasattr(module, "unembedding")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # split over a tensor group, the halves of gate_up have an axis of their own
        if not (parameter.ndim == 2 or name.endswith("gate_up.weight")) or 1 in parameter.shape:
            vectors.append(parameter)
        elif id(parameter) in edges or name.rpartition(".")[0].rpartition(".")[2] in ("head", "lm_head", "score"):
            edge.append(parameter)
        else:
            inner.append(parameter)
    return inner, edge, vectors
