"""What makes a training step fast on a CPU besides its kernels."""

import ctypes
import os
import shutil
import sys
import warnings

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    By default glibc gives every large block back to the system, which hands it out again page by page, set to zero:
    a tenth of a training step. Nothing is done where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, 1 << 30)
    mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs for a CPU; says so where there is none."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name):
        return True
    warnings.warn(
        f"layers are not compiled: there is no C++ compiler {name!r}. Install one (Debian: apt install g++), or name "
        "yours in the environment variable CXX; the results are the same, only slower",
        stacklevel=2,
    )
    return False
