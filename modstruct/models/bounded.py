"""A model's recipe may come from others: its sizes are held against its weights before memory is taken for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modstruct.checkpoints import described
from modstruct.errors import refuse

TIMES = 16
"""Elements that building a model may take for each of its weights: initial values and tables are made on the way."""
AT_LEAST = 1 << 26
_MAKERS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace", "eye", "randperm")
"""Operators of aten whose first argument says how much they make."""


class _Bounded(TorchDispatchMode):
    def __init__(self, most: int):
        super().__init__()
        self.left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in _MAKERS and args:
            self.left -= prod(args[0]) if isinstance(args[0], (list, tuple)) else max(map(_number, args))
            if self.left < 0:
                raise MemoryError
        return func(*args, **kwargs or {})


def _number(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) else 0


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor], option: str, where: object) -> Iterator[None]:
    """Build a model for these weights. Raises ValueError, naming option and where they are, for a much larger one."""
    elements = sum(value.numel() for value in described(weights).values())
    try:
        with _Bounded(max(AT_LEAST, TIMES * elements)):
            yield
    except MemoryError:
        refuse(option, str(where), f"its recipe describes a model far larger than its {elements:,} weights")
