"""The cases that the contract tests run over are run on CUDA too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
