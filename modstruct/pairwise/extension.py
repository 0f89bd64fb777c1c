"""The way to the compiled kernels: finds modstruct._C, and checks tensors before their addresses are handed over."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from modstruct.errors import require


def load_extension() -> ModuleType:
    """modstruct._C, imported at first use. Raises RuntimeError with the remedy where it is missing or broken."""
    try:
        from modstruct import _C
    except ImportError as error:
        raise RuntimeError(
            f"modstruct._C, the compiled part, cannot be imported ({error}): run `pip install -e .` in the checkout"
        ) from error
    return _C


def check_array(name: str, array: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, naming the argument, unless `array` is what a kernel takes: of this shape, without gaps."""
    require(tuple(array.shape) == shape, name, tuple(array.shape), f"must have shape {shape}")
    require(array.numel() > 0, name, tuple(array.shape), "must not be empty")
    require(array.dtype == dtype, name, array.dtype, f"must be {dtype}")
    require(array.device == device, name, array.device, f"must lie on {device}")
    require(array.is_contiguous(), name, array.stride(), "must be contiguous: call .contiguous() first")
