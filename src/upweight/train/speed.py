"""How fast this machine multiplies matrices: what a plan's times and a run's utilisation are measured against."""

import functools
import math
import time

import torch

from upweight.model.memory import keep_freed_memory
from upweight.model.products import linear

MEASURED_SECONDS = 0.25
NARROWEST, WIDEST = 64, 4096
WIDEST_ON_CPU = 512
"""A processor is as fast as it gets well before, and one wider product would take seconds."""


def peak_flops_per_second(width: float | int, device: str, dtype: str) -> float:
    """Operations a second of the largest matrix product of a layer of about this width; measured once in a process."""
    on_cpu = torch.device(device).type == "cpu"
    rounded = 2 ** round(math.log2(max(NARROWEST, min(WIDEST_ON_CPU if on_cpu else WIDEST, width))))
    return _measured(rounded, device, dtype) * (torch.get_num_threads() if on_cpu else 1)


@functools.cache
def _measured(width: int, device: str, dtype: str) -> float:
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
            product = linear(left, right)
        product[0, 0].item()  # waits for the device
        best = min(best, (clock() - start) / products)
    torch.set_num_threads(threads)
    return 2 * rows * width * 4 * width / best
