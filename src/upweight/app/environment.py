"""The machine that a step ran on: kept in the manifest and shown by the report, no part of any identity."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.model.memory import give_back_freed_memory

PACKAGES = ("upweight", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "daft", "lancedb", "msgspec")


def checked_machine(device: str, threads: int, workers: int, unsafe_execution: bool, **training: Any) -> Machine:
    """The machine that the command line describes. Raises UserError where this one has no such device.

    Args:
        training: Machine's fields about how a model is trained.
    """
    if threads < 0 or workers < 1:
        raise UserError(f"threads is {threads} and workers {workers}: expected threads >= 0 and workers >= 1")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r} ({str(error).splitlines()[0]}): try cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("this torch sees no CUDA device: install a CUDA build of torch, or use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {device}: this machine has {torch.cuda.device_count()}, counted from cuda:0")
    return Machine(device=device, threads=threads, workers=workers, unsafe_execution=unsafe_execution, **training)


def environment(machine: Machine) -> Mapping[str, object]:
    """What the result was made on; kept in the manifest, no part of the identity."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": machine.device,
        "accelerator": torch.cuda.get_device_name(0) if machine.device.startswith("cuda") else "",
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
        "command": sys.argv[1:],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def reset_peak_memory() -> None:
    """Give back what earlier steps freed and start the kernel's high-water mark anew, so that each step reports its own
    peak."""
    give_back_freed_memory()
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        try:
            mark.write_text("5")
        except OSError:  # refused in some containers: the peak is then that of the run so far
            return


def peak_memory_bytes() -> int:
    """The largest resident size of this process since the last reset; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def resident_memory_bytes() -> int:
    """The resident size of this process now; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
