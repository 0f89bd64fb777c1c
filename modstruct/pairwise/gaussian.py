"""Gaussian potential over all pairs of the global batch: the uniformity term, with no N x N matrix in memory.

The gradient of sum_jk G_jk with respect to x_j, 2 t sum_k G_jk (y_k - x_j), costs one more product of matrices while
the potentials of a tile are at hand. So the forward makes it, where a gradient is wanted; a backward that started from
x and y would compute all distances again.

Every pair of different rows is computed once, on one process: each takes its own rows with themselves, and with the
rows of the next half of the processes, in a ring. The gradient of the others' rows goes back by a reduce-scatter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import cpu_kernels, cuda_kernels, torch_tiles
from modstruct.pairwise.global_batch import checked_rows, global_rows
from modstruct.pairwise.operators import check_precision, operator

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
    check_precision(precision)
    total = distributed.all_sum(gaussian_potential_sum(z, distributed.gather(z), float(t), precision))
    return (total.log() - 2 * math.log(global_rows(z))).to(z.dtype)


def gaussian_potential_sum(z: Tensor, columns: Tensor, t: float, precision: Precision) -> Tensor:
    """This process's part of sum_jk exp(-t |z_j - z_k|^2), () in float64, whose sum over processes is the whole.

    z: (B, D); columns: (N, D), those of all processes in order of rank.
    """
    with_grad = torch.is_grad_enabled() and z.requires_grad
    total = potential_sum(z, None, t, with_grad, precision)[0]
    if len(columns) > len(z):
        for rows, others in _pairs_with_others(z, columns):
            if len(rows):
                total = total + 2 * potential_sum(rows, others, t, with_grad, precision)[0]
            else:  # an empty sum, so that this process takes part in the backward of the gather
                total = total + others[:0].sum()
    return total


def _pairs_with_others(z: Tensor, gathered: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Which rows this process pairs with which of the others, so that each pair of processes is computed once.

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


potential_sum = operator(
    torch_tiles.gaussian_potential_sum,
    cpu=cpu_kernels.gaussian_potential_sum,
    cuda=cuda_kernels.gaussian_potential_sum,
)


@potential_sum.register_fake
def _(x, y, t, with_grad, precision):
    y_rows = 0 if y is None or not with_grad else y.shape[0]
    total = x.new_empty((), dtype=torch.float64)
    return total, x.new_empty(x.shape[0] if with_grad else 0, x.shape[1]), x.new_empty(y_rows, x.shape[1])


@torch.library.custom_op("modstruct::gaussian_potential_grad", mutates_args=())
def potential_grad(gradient: Tensor, x: Tensor, x_grad: Tensor, y_grad: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, D) and y (N, D) or (0, D), from that of the sum, (), and the results of `potential_sum`.

    An operator without a derivative, and given x although x_grad is enough: so autograd refuses a second derivative,
    which would otherwise come out as zero.
    """
    roles = 1 if len(y_grad) else 2  # without y each row of x is in the sum as x_j and as x_k
    return x_grad * (2 * t * roles * gradient).to(x.dtype), y_grad * (2 * t * gradient).to(x.dtype)


@potential_grad.register_fake
def _(gradient, x, x_grad, y_grad, t):
    return torch.empty_like(x_grad), torch.empty_like(y_grad)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, ctx.t, ctx.with_grad, _ = inputs
    ctx.has_columns = y is not None
    _, x_grad, y_grad = output
    ctx.mark_non_differentiable(x_grad, y_grad)
    ctx.save_for_backward(x, x_grad, y_grad)


def _backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    require(ctx.with_grad, "with_grad", ctx.with_grad, "must be True where a gradient is wanted")
    x_grad, y_grad = potential_grad(gradient, *ctx.saved_tensors, ctx.t)
    return x_grad, y_grad if ctx.has_columns else None, None, None, None


potential_sum.register_autograd(_backward, setup_context=_keep)
