"""The compiler that fuses layers on a CPU, which may be missing."""

import os
import shutil
import sys
import warnings


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
