"""What tensors cost beyond their kernels on a CPU: the pages of memory that they lie in."""

import contextlib
import ctypes
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    By default glibc gives every large block back to the system, which hands it out again page by page, set to zero:
    a tenth of a training step, a fifth of reading prompts. Nothing is done where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, 1 << 30)
    mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Hand what this process has freed back to the system, all pages of it that nothing else lies in.

    Between two kinds of work that allocate blocks of other sizes, neither of which fits where those of the other were:
    kept, their memory would add up. Nothing is done where there is no glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without it keeps what is free
            ctypes.CDLL(None).malloc_trim(0)
