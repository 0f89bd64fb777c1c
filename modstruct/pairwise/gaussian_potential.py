"""Gaussian potential over all pairs of the global batch: the uniformity term's sum, with no N x N matrix in memory.

The sum over pairs is a sum of row sums  s_j = sum_k exp(-t |x_j - y_k|^2).  The gradient of s_j with respect to x_j is
2 t pull_j,  pull_j = sum_k exp(-t |x_j - y_k|^2) (y_k - x_j),  and pull_j costs one more product of matrices while the
potentials of a tile are at hand. So the forward makes it, where a gradient is wanted, and keeps (n, D) numbers; a
backward that started from x and y would compute all distances again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import require
from modstruct.pairwise.extension import gaussian_potential_sums_cpu

TILE_ROWS, TILE_COLUMNS = 1024, 4096  # of the plain-torch form: 16 MB in float32
LARGEST_FLOAT32 = 3.4e38


def gaussian_potential_sum(z: Tensor, t: float) -> Tensor:
    """Sum of exp(-t |z_j - z_k|^2) over all pairs j, k of the global batch, j = k included.

    It stands inside L_Uni of Jiang et al. 2023, section 4.1.
    z: (N, D), this process's embeddings; every process brings the same number of rows. Lengths need not be 1. Floating
    point: float16 and bfloat16 are taken to float32; float64 stays float64 and goes through plain torch, for checks.
    t: positive.
    Returns a scalar, float32, the same on every process, on the gradient scale of modstruct.distributed. A NaN in any
    row reaches it. In float32 the relative error of a term is about 2e-7 t (|z_j|^2 + |z_k|^2), lengths taken from the
    mean of the batch; on a GPU only if torch's float32 products are not set to tf32.
    Raises ValueError where z is empty, not 2-D or not floating point, or t is not positive.
    """
    return _sum_and_rows(z, t)[0]


def gaussian_potential(z: Tensor, t: float) -> Tensor:
    """Logarithm of the mean of exp(-t |z_j - z_k|^2) over all N^2 pairs of the global batch.

    This is the uniformity of Wang & Isola 2020 (section 4.1.2), but with j = k included. Arguments as for
    `gaussian_potential_sum`. Returns a scalar, at most 0.
    """
    total, rows = _sum_and_rows(z, t)
    return total.log() - 2 * math.log(rows)


def _sum_and_rows(z: Tensor, t: float) -> tuple[Tensor, int]:
    """The sum over all pairs, and the number of rows of the global batch."""
    require(z.dim() == 2, "z", tuple(z.shape), "must be 2-D, (N, D)")
    require(z.numel() > 0, "z", tuple(z.shape), "must hold at least one row and one dimension")
    require(z.is_floating_point(), "z", z.dtype, "must be floating point")
    require(0 < t < LARGEST_FLOAT32, "t", t, "must be positive and finite")
    rows = z if z.dtype == torch.float64 else z.float()
    rows = rows.contiguous()
    # Every pair j, k is in the sum twice, once with z_j as the row and once as the column, and both terms are equal. So
    # the gradient of the whole sum with respect to z_j is twice that of row sum j with the columns held constant, and
    # no gradient has to travel back through the gather.
    columns = distributed.gather(rows.detach())
    with_gradient = torch.is_grad_enabled() and rows.requires_grad
    own = gaussian_potential_sums(rows, columns, float(t), with_gradient)[0].sum()
    own = 2 * own - own.detach()  # the value once, the gradient twice
    return distributed.all_sum(own), columns.shape[0]


@torch.library.custom_op("modstruct::gaussian_potential_sums", mutates_args=())
def gaussian_potential_sums(rows: Tensor, columns: Tensor, t: float, with_pull: bool) -> tuple[Tensor, Tensor]:
    """Row sums s and, `with_pull`, pull (the formulas stand at the head of this file).

    rows: (n, D), columns: (N, D), of one dtype and device, contiguous.
    Returns (n,) and (n, D), or (0, D) without the pull. Differentiable with respect to rows, and only `with_pull`;
    columns are constants.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        return gaussian_potential_sums_cpu(rows, columns, t, with_pull)
    return gaussian_potential_sums_torch(rows, columns, t, with_pull)


@gaussian_potential_sums.register_fake
def _(rows: Tensor, columns: Tensor, t: float, with_pull: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), rows.new_empty((rows.shape[0] if with_pull else 0, rows.shape[1]))


@torch.library.custom_op("modstruct::gaussian_potential_sums_backward", mutates_args=())
def gaussian_potential_sums_backward(gradient: Tensor, rows: Tensor, pull: Tensor, t: float) -> Tensor:
    """Gradient with respect to the rows: gradient (n,) of the row sums, rows and pull (n, D) -> (n, D).

    An op of its own without a derivative, and given the rows although the pull is enough: so autograd refuses a second
    derivative, which would otherwise come out as zero.
    """
    return pull * (2 * t * gradient)[:, None]


@gaussian_potential_sums_backward.register_fake
def _(gradient: Tensor, rows: Tensor, pull: Tensor, t: float) -> Tensor:
    return torch.empty_like(pull)


def _keep_pull(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    rows, _, ctx.t, ctx.with_pull = inputs
    pull = output[1]
    ctx.mark_non_differentiable(pull)
    ctx.save_for_backward(rows, pull)


def _backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    require(ctx.with_pull, "with_pull", ctx.with_pull, "must be True where a gradient is wanted")
    rows, pull = ctx.saved_tensors
    return gaussian_potential_sums_backward(gradient, rows, pull, ctx.t), None, None, None


gaussian_potential_sums.register_autograd(_backward, setup_context=_keep_pull)


def gaussian_potential_sums_torch(rows: Tensor, columns: Tensor, t: float, with_pull: bool) -> tuple[Tensor, Tensor]:
    """The same in plain torch, tile by tile, for what the kernels do not serve: other devices, and float64."""
    with torch.autocast(rows.device.type, enabled=False):  # else the products would run in half precision
        center = columns.mean(0)  # as in csrc/pairwise_cpu.cpp: distances stay, digits are kept
        sums, pulls = [], []
        for row_tile in (rows - center).split(TILE_ROWS):
            total = row_tile.new_zeros(row_tile.shape[0], dtype=torch.float64)
            pull = torch.zeros_like(row_tile)
            for column_tile in columns.split(TILE_COLUMNS):
                column_tile = column_tile - center
                norms = row_tile.square().sum(1)[:, None] + column_tile.square().sum(1)
                squares = torch.addmm(norms, row_tile, column_tile.T, alpha=-2).clamp_min(0)
                potentials = torch.exp(-t * squares)
                total += potentials.sum(1)
                if with_pull:
                    pull += potentials @ column_tile
            sums.append(total)
            pulls.append(pull - total[:, None].to(pull.dtype) * row_tile)
        sums = torch.cat(sums).to(rows.dtype)
        return sums, torch.cat(pulls) if with_pull else rows.new_empty((0, rows.shape[1]))
