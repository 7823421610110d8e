"""Rotary positions (arXiv 2104.09864) and how their frequencies are stretched for longer contexts.

Feature pairs (2i, 2i+1) of a head turn by the angle position * base^(-2i / head_size). Pairs lie next to each other, so
that a head is a row of complex numbers and the rotation one multiplication; Hugging Face weights pair feature i with
feature i + head_size/2 instead, and model/weights.py permutes the rows of the query and key projections on the way in
and out. Dot products of queries and keys are the same in both orders.

ABF (adjusted base frequency, arXiv 2309.16039) is nothing but a larger base: `Transformer.set_rope_base`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from upweight.model.precision import widened


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the frequencies depart from those of the base.

    Attributes:
        kind: "linear" divides all by `factor`; "llama3" divides the slow ones only, with a smooth passage between
            `low_frequency` and `high_frequency` turns over the original context; "yarn" (arXiv 2309.00071) likewise by
            a ramp between `beta_slow` and `beta_fast` turns, and scales queries and keys by `attention_factor`.
        factor: how many times longer the context became.
        original_context: the context in tokens that the checkpoint was trained at before.
        attention_factor: yarn only; None takes 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_context: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f'RoPE scaling "{self.kind}" is unknown: expected "linear", "llama3" or "yarn"')
        if self.factor < 1:
            raise ValueError(f"RoPE scaling by {self.factor}: a factor below 1 would shorten the context")


def frequencies(head_size: int, base: float, scaling: RopeScaling | None = None) -> Float[Tensor, " pair"]:
    """The angle in radians by which each feature pair turns from one position to the next."""
    # 1 / base^x rather than base^-x: one rounding apart, and a thousand positions on that is a different angle than the
    # one that imported weights were trained with
    plain = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "llama3":
        turns = scaling.original_context * plain / (2 * math.pi)
        passage = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        return torch.lerp(stretched, plain, passage.clamp(0, 1))
    return torch.lerp(plain, stretched, _yarn_ramp(head_size, base, scaling))


def _yarn_ramp(head_size: int, base: float, scaling: RopeScaling) -> Float[Tensor, " pair"]:
    """0 where the pair turns often enough to keep its frequency, 1 where it is stretched."""

    def pair_of(turns: float) -> float:
        return head_size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_size - 1)
    ramp = (torch.arange(head_size // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    return ramp.clamp(0, 1)


def amplitude(scaling: RopeScaling | None) -> float:
    """What queries and keys are multiplied by besides being turned."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


class RopeTable:
    """The rotations of the first positions as complex numbers, grown on demand and kept for each device."""

    def __init__(self, head_size: int, base: float, scaling: RopeScaling | None) -> None:
        self._frequencies = frequencies(head_size, base, scaling)
        self._amplitude = amplitude(scaling)
        self._tables: dict[torch.device, Tensor] = {}

    def rotations(self, positions: Int[Tensor, "row time"], longest: int) -> Complex[Tensor, "row time 1 1 pair"]:
        """The rotation at each position; `longest` is a bound on the positions, known without asking the device."""
        return self.table(positions.device, longest)[positions][:, :, None, None]

    def table(self, device: torch.device, longest: int) -> Complex[Tensor, "place pair"]:
        """The rotation at each of at least the first `longest` positions."""
        table = self._tables.get(device)
        if table is None or len(table) < longest:
            length = 1 << max(longest - 1, 255).bit_length()
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), self._frequencies)
            table = torch.polar(torch.full_like(angles, self._amplitude), angles).to(device)
            self._tables[device] = table
        return table


def rotate(
    heads: Float[Tensor, "row time kv_head slot size"], rotations: Complex[Tensor, "row time 1 1 pair"]
) -> Float[Tensor, "row kv_head slot time size"]:
    """Turn each feature pair by its angle, and put heads before time, the layout of attention."""
    if not torch.is_grad_enabled():
        return _turn(heads, rotations).permute(0, 2, 3, 1, 4)
    rotated: Tensor = _Rotate.apply(heads, rotations)
    return rotated


def turn(
    heads: Float[Tensor, "row time kv_head slot size"], turns: Float[Tensor, "row time 1 1 pair 2"]
) -> Float[Tensor, "row time kv_head slot size"]:
    """The same turn in real numbers, which the compiler fuses, with time left before heads; `turns` is cos, sin."""
    left, right = widened(heads).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.unbind(-1)
    turned = torch.stack((left * cosine - right * sine, left * sine + right * cosine), dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class _Rotate(torch.autograd.Function):
    """One pass forwards and one backwards; the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotations: Tensor) -> Tensor:
        ctx.save_for_backward(rotations)
        return _turn(heads, rotations).permute(0, 2, 3, 1, 4).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rotations,) = ctx.saved_tensors
        return _turn(gradients[0].permute(0, 3, 1, 2, 4), rotations.conj().resolve_conj()), None


def _turn(heads: Tensor, rotations: Tensor) -> Tensor:
    pairs = torch.view_as_complex(widened(heads).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(heads.dtype)
