"""The machine that a step ran on: kept in the manifest and shown by the report, no part of any identity."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from upweight.core.work import Machine

PACKAGES = ("upweight", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "daft", "lancedb", "msgspec")


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
    """Start the kernel's high-water mark anew, so that each step reports its own peak."""
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
