"""The matrix product as the yardstick: how fast the processor multiplies when it does nothing else."""

import torch

from benchmarks.contest import Turns
from benchmarks.work import Work, dtype

SIZE = 2048


def matmul(turns: Turns, work: Work) -> None:
    """Products of two SIZE x SIZE matrices; the unit is the floating-point operation."""
    a, b = (torch.randn(SIZE, SIZE, dtype=getattr(torch, dtype())) for _ in "ab")
    while turns.step(_product(a, b)):
        pass


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    for _ in range(8):
        torch.mm(a, b)
    return 8 * 2.0 * SIZE**3
