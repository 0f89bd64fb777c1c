"""Finds where a GPU would have to be waited for, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READ = {"_local_scalar_dense", "equal", "is_nonzero"}
"""Values that the host reads: item(), tolist(), float(), `if tensor`."""
SIZED_BY_VALUES = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "_unique", "_unique2"}
SIZED_BY_VALUES |= {"unique_dim", "unique_consecutive", "unique_dim_consecutive"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
FROM_HOST = {"lift_fresh"}
"""torch.tensor(…, device=…), which copies what the host has."""


WITHOUT_OPERATOR = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""What reads the memory of the CPU past torch's operators, or copies to where the tensor is."""


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Raises at what makes the host wait for a GPU: reading values, sizes that depend on them, numbers copied from the
    host. Every tensor is taken for one of the GPU; `.to("cpu")` is not seen."""
    with _Functions(), _Operators():
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside `no_host_waits`: what does not count."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _refuse(function: object) -> None:
    raise AssertionError(f"{function} makes the host wait for the GPU")


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in WITHOUT_OPERATOR:
            _refuse(function)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = name in READ | SIZED_BY_VALUES | FROM_HOST
        waits |= name in INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        waits |= name == "repeat_interleave" and isinstance(args[0], torch.Tensor) and len(args) < 2
        if waits:
            _refuse(function)
        return function(*args, **(kwargs or {}))
