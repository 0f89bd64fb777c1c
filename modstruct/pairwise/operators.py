"""Operators of torch for one process's part of the pairwise terms, each with kernels by device and dtype."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor
from torch.library import CustomOpDef

from modstruct.config import Precision
from modstruct.errors import require

log = logging.getLogger(__name__)
OLDEST_GPU = (8, 0)  # compute capability that has the kernels' instructions


def operator(plain: Callable, *, cpu: Callable, cuda: Callable) -> CustomOpDef:
    """The operator modstruct::NAME, with the name, signature and contract of `plain`.

    plain: serves float64 and devices without kernels. cpu, cuda: the same in float32, by the compiled kernels. All run
    outside autocast, which would halve products. Which one serves is decided by the first argument, a tensor.
    """

    def by_dtype(kernel: Callable, serves: Callable[[torch.device], bool]) -> Callable:
        def run(x: Tensor, *others: object) -> Tensor | tuple[Tensor, ...]:
            serving = kernel if x.dtype == torch.float32 and serves(x.device) else plain
            if not torch.is_autocast_enabled(x.device.type):
                return serving(x, *others)
            with torch.autocast(x.device.type, enabled=False):
                return serving(x, *others)

        return run

    schema = torch.library.infer_schema(plain, mutates_args=())
    fallback = by_dtype(plain, lambda device: False)
    defined = torch.library.custom_op(f"modstruct::{plain.__name__}", fallback, mutates_args=(), schema=schema)
    defined.register_kernel("cpu", by_dtype(cpu, lambda device: True))
    defined.register_kernel("cuda", by_dtype(cuda, has_kernels_for))
    return defined


def check_precision(precision: str) -> None:
    allowed = get_args(Precision)
    require(precision in allowed, "precision", precision, f"must be one of {', '.join(allowed)}")


@functools.cache
def has_kernels_for(gpu: torch.device) -> bool:
    """Whether this build has kernels for the GPU; logs a warning once where it has none."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability < OLDEST_GPU:
        log.warning(
            "%s has compute capability %d.%d, and modstruct's CUDA kernels need %d.%d: pairwise terms run on it as "
            "plain torch, tile by tile",
            *(torch.cuda.get_device_name(gpu), *capability, *OLDEST_GPU),
        )
        return False
    if load_extension().features()["cuda"]:
        return True
    log.warning(
        "this build of modstruct holds no CUDA kernels (nvcc was not found when it was installed): pairwise terms on "
        "the GPU run as plain torch, tile by tile; for kernels put nvcc on the PATH and run `pip install -e .` again"
    )
    return False


def load_extension() -> ModuleType:
    """modstruct._C, imported at first use. Raises RuntimeError with the remedy where it is missing or broken."""
    try:
        return importlib.import_module("modstruct._C")
    except ImportError as error:
        raise RuntimeError(
            f"modstruct._C, the compiled part, cannot be imported ({error}): run `pip install -e .` in the checkout"
        ) from error


def check_array(name: str, array: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, naming the argument, unless `array` is what a kernel takes: of this shape, without gaps."""
    require(tuple(array.shape) == shape, name, tuple(array.shape), f"must have shape {shape}")
    require(array.numel() > 0, name, tuple(array.shape), "must not be empty")
    require(array.dtype == dtype, name, array.dtype, f"must be {dtype}")
    require(array.device == device, name, array.device, f"must lie on {device}")
    require(array.is_contiguous(), name, array.stride(), "must be contiguous: call .contiguous() first")
