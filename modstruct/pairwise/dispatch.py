"""Which kernels compute the local terms of a tensor.

cpu_kernels, cuda_kernels and torch_tiles have the same functions: one process's part of each term, without derivatives.
The operators in symmetric_contrast.py, row_contrast.py, gaussian.py, geometric.py and ranks.py call them
through here, and give them derivatives.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import cpu_kernels, torch_tiles
from modstruct.pairwise.extension import load_extension

log = logging.getLogger(__name__)
OLDEST_GPU = (8, 0)  # compute capability that has the kernels' instructions


def call(function: str, x: Tensor, *args: object):
    """The local term `function` by the kernels that serve x; outside autocast, which would halve plain products."""
    with torch.autocast(x.device.type, enabled=False):
        return getattr(_kernels_for(x), function)(x, *args)


def check_precision(precision: str) -> None:
    allowed = get_args(Precision)
    require(precision in allowed, "precision", precision, f"must be one of {', '.join(allowed)}")


def _kernels_for(x: Tensor) -> ModuleType:
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return cpu_kernels
    if x.dtype == torch.float32 and x.device.type == "cuda" and has_kernels_for(x.device):
        from modstruct.pairwise import cuda_kernels

        return cuda_kernels
    return torch_tiles


@functools.cache
def has_kernels_for(gpu: torch.device) -> bool:
    """Whether this build has kernels for the GPU; says so once where it has none."""
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
