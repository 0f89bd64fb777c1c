"""The rows that one process brings to the global batch: checked, counted, averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import require


def paired_rows(x: Tensor, y: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """x and y, both (B, D), row j of each belonging to pair j; half precision becomes float32, float64 stays.

    names: what the caller calls them, for the error. Raises ValueError where the shapes do not fit.
    """
    fits = x.ndim == 2 and x.shape == y.shape and len(x) > 0
    require(
        fits, f"shapes of {names}", (tuple(x.shape), tuple(y.shape)), "give both the same shape (B, D), B at least 1"
    )
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), y.to(dtype)


def global_rows(rows: Tensor) -> int:
    """N, the rows of all processes together; every process brings the same number, (B, ...)."""
    return len(rows) * distributed.world_size()


def global_mean(values: Tensor) -> Tensor:
    """Mean over the pairs of all processes, of this process's (B,); a scalar, the same on every process."""
    return distributed.all_sum(values.sum()) / global_rows(values)
