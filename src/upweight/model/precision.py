"""What must not be rounded to bfloat16 is done in float32, or in float64 where a model is of float64."""

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor

from upweight.core.errors import UserError

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def usual_precision(device: torch.device | str) -> Precision:
    """What is sampled in where nobody asks for another: bfloat16 on CUDA, as the field does, float32 elsewhere."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def multiplied_in(dtype: str, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """Within, matrix products are taken in `dtype`, whatever the weights are held in; "bfloat16" is autocast.

    Two figures that are to be compared, such as a policy's log-probability and a reference's, are taken in one.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    if dtype == "bfloat16":
        # without its cache of bfloat16 weights, which would outlive the layers that are computed again
        return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)
    raise UserError(f"dtype is {dtype!r}: expected 'float32' or 'bfloat16'")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """`x` in its `wide_dtype`."""
    return x.to(wide_dtype(x.dtype))
