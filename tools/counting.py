"""Bytes, messages and operations of a training step, counted while it runs, on tensors without numbers or real ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from modstruct.pairwise import cpu_kernels

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION = {
    CPU_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Count(TorchDispatchMode):
    """Bytes of tensors that are alive and the most at any time, and of what crosses the processes, by kind.

    known: what lies there before and does not count, else a weight would when a view of it is made.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.sent: Counter[str] = Counter()
        self._before = [tensor.untyped_storage() for tensor in known]
        self._known = weakref.WeakSet[Any](self._before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return 0  # a number that is read while the model is built: timm's rates of dropped layers
        if name.startswith("c10d::"):
            self.sent[_kind(name)] += max(sum(t.nbytes for t in _tensors(arg)) for arg in args)
        result = function(*args, **kwargs or {})
        for tensor in _tensors(result):
            self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._released, size)

    def _released(self, size: int) -> None:
        self.alive -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


KINDS = ("all_reduce", "all_to_all", "gather")


def _kind(name: str) -> str:
    """Of KINDS; a reduce-scatter costs what a gather does."""
    return next((kind for kind in KINDS[:2] if kind.replace("_", "") in name), "gather")


@contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """Tensors without numbers, on a process that believes itself to be one of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        # EMA weights are a copy in float32, as the weights are; torch cannot convert tensors without numbers in place.
        whole, copied = (
            mock.patch.object(nn.Module, "float", lambda module: module),
            mock.patch.object(FakeTensor, "__deepcopy__", _copied),
        )
        kept = mock.patch.object(cpu_kernels, "KEPT_BYTES", 0)  # a GPU keeps no logits
        with FakeTensorMode(allow_non_fake_inputs=True), whole, copied, kept:
            yield
    finally:
        dist.destroy_process_group()


def _copied(tensor: Tensor, memo: dict[int, object]) -> Tensor:
    """What copy.deepcopy makes of a tensor without numbers, for EMA weights: torch's own looks for some."""
    copied = tensor.detach().clone()
    copied = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    memo[id(tensor)] = copied
    return copied
