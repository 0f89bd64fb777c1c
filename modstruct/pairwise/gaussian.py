"""Gaussian potential over all pairs of the global batch: the uniformity term, with no N x N matrix in memory.

The gradient of sum_jk G_jk with respect to x_j is 2 t pull_j,  pull_j = sum_k G_jk (y_k - x_j),  and a pull costs one
more product of matrices while the potentials of a tile are at hand. So the forward makes it, where a gradient is
wanted; a backward that started from x and y would compute all distances again.

Every pair of different rows is computed once, on one process: each takes its own rows with themselves, and with the
rows of the next half of the processes, in a circle. The gradient of the others' rows goes back by a reduce-scatter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import dispatch
from modstruct.pairwise.global_batch import checked_rows, global_rows

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.2e-38, 3.4e38  # normal numbers: kernels take t as one


def gaussian_potential(z: Tensor, t: float, precision: Precision = "float32") -> Tensor:
    """log( 1/N^2 sum_jk exp(-t |z_j - z_k|^2) ), over all pairs of the global batch, j = k included.

    This is the uniformity of Wang & Isola 2020 (section 4.1.2), but with j = k included, as in L_Uni of Jiang et al.
    2023, section 4.1. z: this process's (B, D) embeddings, the same B on every process; lengths need not be 1; half
    precision is taken to float32. t: positive. precision: how products are formed on a GPU, see config.Precision.
    Returns a scalar, at most 0, the same on every process. A NaN in any row reaches it. In float32 the relative error
    of a potential is about 2e-7 t (|z_j|^2 + |z_k|^2), lengths taken from the mean of the rows it is computed with.
    Raises ValueError where z is empty, not 2-D or not floating point, or t is not positive.
    """
    (z,) = checked_rows(z=z)
    require(SMALLEST_FLOAT32 < t < LARGEST_FLOAT32, "t", t, "must be positive and finite, as a float32")
    dispatch.check_precision(precision)
    total = distributed.all_sum(gaussian_potential_sum(z, distributed.gather(z), float(t), precision))
    return (total.log() - 2 * math.log(global_rows(z))).to(z.dtype)


def gaussian_potential_sum(z: Tensor, columns: Tensor, t: float, precision: Precision) -> Tensor:
    """This process's part of sum_jk exp(-t |z_j - z_k|^2), () in float64, whose sum over processes is the whole.

    z: (B, D); columns: (N, D), those of all processes in order of rank.
    """
    with_pull = torch.is_grad_enabled() and z.requires_grad
    total = potential_sum(z, None, t, with_pull, precision)[0]
    if len(columns) > len(z):
        for rows, others in _pairs_with_others(z, columns):
            if len(rows):
                total = total + 2 * potential_sum(rows, others, t, with_pull, precision)[0]
            else:  # a sum of nothing, through which this process joins the backward of the gather
                total = total + others[:0].sum()
    return total


def _pairs_with_others(z: Tensor, gathered: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Which rows this process pairs with which of the others, so that each pair of processes is served once.

    With an even number of processes the one opposite is shared: the lower rank takes the first half of its own rows
    against all of the other's, the higher rank its own rows against the second half of the lower one's. Of a single row
    the first half is empty.
    """
    processes, rank, count = distributed.world_size(), distributed.rank(), len(z)
    blocks = gathered.split(count)
    following = (processes - 1) // 2
    pairs = []
    if following:
        columns = torch.cat([blocks[(rank + step) % processes] for step in range(1, following + 1)])
        pairs.append((z, columns))
    if processes % 2 == 0:
        opposite = blocks[(rank + processes // 2) % processes]
        half = count // 2
        pairs.append((z[:half], opposite) if rank < processes // 2 else (opposite[half:], z))
    return pairs


@torch.library.custom_op("modstruct::gaussian_potential_sum", mutates_args=())
def potential_sum(
    x: Tensor, y: Tensor | None, t: float, with_pull: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all pairs j, k of exp(-t |x_j - y_k|^2), y being x where it is None, and the pulls of x and y.

    x: (B, D), y: (N, D), of one dtype and device, contiguous.
    Returns () in float64, and, `with_pull`, (B, D) and (N, D); without it or without y, no rows in their place.
    Differentiable with respect to x and y, and only `with_pull`.
    """
    return dispatch.call("gaussian_potential", x, y, t, with_pull, precision)


@potential_sum.register_fake
def _(x: Tensor, y: Tensor | None, t: float, with_pull: bool, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    x_rows = x.shape[0] if with_pull else 0
    y_rows = y.shape[0] if with_pull and y is not None else 0
    total = x.new_empty((), dtype=torch.float64)
    return total, x.new_empty(x_rows, x.shape[1]), x.new_empty(y_rows, x.shape[1])


@torch.library.custom_op("modstruct::gaussian_potential_gradients", mutates_args=())
def potential_gradients(gradient: Tensor, x: Tensor, x_pull: Tensor, y_pull: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, D) and y (N, D) or (0, D), from that of the sum, ().

    An operator without a derivative, and given x although the pulls are enough: so autograd refuses a second
    derivative, which would otherwise come out as zero.
    """
    roles = 1 if len(y_pull) else 2  # without y each row of x is in the sum as x_j and as x_k
    return x_pull * (2 * t * roles * gradient).to(x.dtype), y_pull * (2 * t * gradient).to(x.dtype)


@potential_gradients.register_fake
def _(gradient: Tensor, x: Tensor, x_pull: Tensor, y_pull: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_pull), torch.empty_like(y_pull)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, ctx.t, ctx.with_pull, _ = inputs
    ctx.has_columns = y is not None
    _, x_pull, y_pull = output
    ctx.mark_non_differentiable(x_pull, y_pull)
    ctx.save_for_backward(x, x_pull, y_pull)


def _backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    require(ctx.with_pull, "with_pull", ctx.with_pull, "must be True where a gradient is wanted")
    x_gradient, y_gradient = potential_gradients(gradient, *ctx.saved_tensors, ctx.t)
    return x_gradient, y_gradient if ctx.has_columns else None, None, None, None


potential_sum.register_autograd(_backward, setup_context=_keep)
