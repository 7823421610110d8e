"""What tensors cost beyond their kernels on a CPU: the pages of memory that they lie in."""

import ctypes

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
