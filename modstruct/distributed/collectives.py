"""Sums, gathers and row exchanges over the processes that autograd understands.

The gradient scale of the whole project is decided here and only here. Every loss of modstruct returns the
value of the GLOBAL batch on every process. `gather` and `all_sum` have the true adjoint of the collective, so a
backward on every process leaves, on process p, W times that process's share of the gradient of that value
(W processes each start a backward of the same value). DeepSpeed then averages over the W processes, and the mean
is exactly the gradient of the global value.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from modstruct.distributed.processes import is_distributed, rank, world_size
from modstruct.errors import require


def max_over_processes(values: Tensor) -> Tensor:
    """Elementwise maximum over the processes; no gradient. The input is left as it is."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum over the processes; no gradient. The input is left as it is."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


# torch 2.14 renamed both, and warns of the old names in every process.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        out = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        _all_gather(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        mine = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        _reduce_scatter(mine, gradient.contiguous())
        return mine


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return sum_over_processes(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)


def require_equal_rows(rows: Tensor, name: str) -> None:
    """Refuse, on every process alike, rows (B, …) that are not as many on each: a gather of them would hang."""
    if world_size() == 1:
        return
    count = len(rows)
    most, fewest = max_over_processes(torch.tensor([count, -count], device=rows.device)).tolist()
    remedy = f"every process must bring the same number, but they range from {-fewest} to {most}"
    require(most == -fewest, name, count, remedy)


def gather(rows: Tensor) -> Tensor:
    """(B, …) of every process -> (W B, …) on every process, in order of rank; differentiable.

    Every process must bring the same number of rows (`require_equal_rows` asks).
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over the processes, on every process; differentiable."""
    return _AllSum.apply(values) if world_size() > 1 else values


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sent: Tensor, sends: list[int], receives: list[int], order: Tensor) -> Tensor:
        ctx.sends, ctx.receives, ctx.shape = sends, receives, rows.shape
        ctx.save_for_backward(sent, order)
        received = rows.new_empty((sum(receives), *rows.shape[1:]))
        dist.all_to_all_single(received, rows[sent].contiguous(), receives, sends)
        return received[order]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        sent, order = ctx.saved_tensors
        back = torch.empty_like(gradient)
        back[order] = gradient
        returned = gradient.new_empty((sum(ctx.sends), *gradient.shape[1:]))
        dist.all_to_all_single(returned, back.contiguous(), ctx.sends, ctx.receives)
        total = gradient.new_zeros(ctx.shape)
        # Not index_add: on a GPU its sums depend on chance.
        return total.index_put_((sent,), returned, accumulate=True), None, None, None, None


class HostCopy:
    """Small numbers of a device on their way to the host: requested early and read late, so that meanwhile the device
    has other work to do."""

    def __init__(self, values: Tensor):
        self._arrived = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list:
        """The numbers; the host waits for what the device was given before the copy, not for what came after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class RowExchange:
    """Rows of the global batch, wherever they lie, by the numbers that each process wants. Only what is wanted travels.

    wanted: (B,) int64, of all W B rows in order of rank, the same B on every process. Collective.
    How many rows go where is known to the device alone, and the host has to know it: the one place of a fusion step
    where it waits for the device. Make the exchange as soon as `wanted` is known, and take rows as late as there is
    other work. A process alone waits for nothing.
    """

    def __init__(self, wanted: Tensor):
        self.wanted = wanted
        self._splits: list[list[int]] | None = None
        if world_size() == 1:
            return
        count, me = len(wanted), rank()
        of_all = gather(wanted)  # (W B,)
        owners = of_all // count
        mine = owners.view(world_size(), -1)[me]
        # No row is picked by whether it is wanted: how many these are, the host would have to wait for.
        self._sent = (of_all % count)[torch.argsort((owners != me).to(torch.uint8), stable=True)]
        # Rows come in order of their owners, and of each owner's in the order wanted.
        self._order = torch.empty_like(mine)
        self._order[torch.argsort(mine, stable=True)] = torch.arange(count, device=mine.device)
        sends = (owners.view(world_size(), -1) == me).sum(1)
        receives = (mine == torch.arange(world_size(), device=mine.device)[:, None]).sum(1)
        self._copy = HostCopy(torch.stack([sends, receives]))

    def __call__(self, rows: Tensor) -> Tensor:
        """Row wanted[j] of all processes' rows, (B, …), of this process's (B, …); differentiable.

        A row may be wanted often; its gradient is the sum.
        """
        if world_size() == 1:
            return rows[self.wanted]
        if self._splits is None:
            self._splits = self._copy.read()
            self._sent = self._sent[: sum(self._splits[0])]
        return _Exchange.apply(rows, self._sent, *self._splits, self._order)
