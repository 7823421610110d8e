"""What must not be rounded to bfloat16 is done in float32, or in float64 where a model is of float64."""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def usual_precision(device: torch.device | str) -> Precision:
    """What is sampled in where nobody asks for another: bfloat16 on CUDA, as the field does, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """`x` in its `wide_dtype`."""
    return x.to(wide_dtype(x.dtype))
