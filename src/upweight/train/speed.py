"""How fast this machine multiplies matrices: what a plan's times and a run's utilisation are measured against."""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from upweight.model.memory import keep_freed_memory
from upweight.model.products import faster_in_float32, linear

MEASURED_SECONDS = 0.25
NARROWEST, WIDEST = 64, 4096
WIDEST_ON_CPU = 512
"""A processor is as fast as it gets well before, and one wider product would take seconds."""


def peak_flops_per_second(width: float | int, device: str, dtype: str) -> float:
    """Operations a second of the largest matrix product of a layer of about this width; measured once in a process."""
    on_cpu = torch.device(device).type == "cpu"
    return _measured(_rounded(width, on_cpu=on_cpu), device, dtype) * (torch.get_num_threads() if on_cpu else 1)


def plain_flops_per_second(width: float | int, device: str, dtype: str) -> float:
    """The same by torch's own choice of library, where this package takes a faster one for its products."""
    if dtype != "float32" or torch.device(device).type != "cpu" or not faster_in_float32():
        return peak_flops_per_second(width, device, dtype)
    return _measured(_rounded(width, on_cpu=True), device, dtype, functional.linear) * torch.get_num_threads()


def _rounded(width: float | int, *, on_cpu: bool) -> int:
    return int(2 ** round(math.log2(max(NARROWEST, min(WIDEST_ON_CPU if on_cpu else WIDEST, width)))))


@functools.cache
def _measured(width: int, device: str, dtype: str, product: Callable[[Tensor, Tensor], Tensor] = linear) -> float:
    """[rows width] x [4 width width]^T of random numbers (constant ones multiply faster on a GPU), the best of several.

    On a CPU that of one thread, by processor time: other work on the machine slows the run, but is no part of the plan,
    and threads that wait for each other would count as working. Several products are timed at once, since the clock of
    the processor is coarse.
    """
    place, kind = torch.device(device), getattr(torch, dtype)
    on_cpu = place.type == "cpu"
    rows, products = (1024, max(1, 2 ** (17 - 2 * width.bit_length()))) if on_cpu else (4096, 8)
    left = torch.randn(rows, width, device=place, dtype=kind)
    right = torch.randn(4 * width, width, device=place, dtype=kind)
    threads = torch.get_num_threads()
    if on_cpu:
        keep_freed_memory()
        torch.set_num_threads(1)
    clock = time.process_time if on_cpu else time.perf_counter
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < MEASURED_SECONDS:
        start = clock()
        for _ in range(products):
            last = product(left, right)
        last[0, 0].item()  # waits for the device
        best = min(best, (clock() - start) / products)
    torch.set_num_threads(threads)
    return 2 * rows * width * 4 * width / best
